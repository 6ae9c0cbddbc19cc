"""What is trained: the networks in numbers, their optimizers, their data.

Nothing here needs Keras or PyTorch: both sides build from the same record.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

SEED = 0


@dataclasses.dataclass(frozen=True)
class ResNet50:
    """`keras.applications.ResNet50` on square images of three channels."""

    image_size: int
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Gpt:
    """The decoder of `recipes.language_model`, its embedding tied."""

    num_layers: int
    width: int
    num_heads: int
    sequence_length: int
    vocabulary_size: int


@dataclasses.dataclass(frozen=True)
class UNet:
    """The network of `recipes.segmentation` on images of three channels."""

    image_size: int
    widths: tuple[int, ...]
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Mlp:
    """Dense layers with ReLU between them: features, hidden..., classes."""

    widths: tuple[int, ...]


Network = ResNet50 | Gpt | UNet | Mlp


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Momentum as Keras and PyTorch both have it while the rate is constant."""

    learning_rate: float
    momentum: float


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Decay is decoupled and takes all weights: what needs no list of them."""

    learning_rate: float
    weight_decay: float
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Case:
    """One model in training.

    Attributes:
        name: as the flag has it.
        network: its sizes.
        batch_size: examples in a step.
        optimizer: its kind and numbers.
        steps: of an epoch; some seconds of work.
        num_batches: different ones, over and over.
    """

    name: str
    network: Network
    batch_size: int
    optimizer: Sgd | AdamW
    steps: int
    num_batches: int = 4

    @property
    def title(self) -> str:
        """The network, its sizes and its batch, for readers."""
        match self.network:
            case ResNet50(size):
                text = f"ResNet-50, {size} px"
            case Gpt(layers, width, _, length, vocabulary):
                text = (
                    f"GPT, {layers} layers, width {width}, {length} tokens, "
                    f"vocabulary {vocabulary}"
                )
            case UNet(size, widths):
                text = f"U-Net {'-'.join(map(str, widths))}, {size} px"
            case Mlp(widths):
                text = f"MLP {'-'.join(map(str, widths))}"
        return f"{text}, batch {self.batch_size}"


# With rates this low no loss comes near 0 in a run: gradients that vanish
# become subnormal, which some CPUs compute slowly and TensorFlow flushes.
_ADAMW = AdamW(learning_rate=1e-4, weight_decay=0.01)
_SGD = Sgd(learning_rate=1e-3, momentum=0.9)

FULL = (
    Case("resnet50", ResNet50(128, 1000), 16, _SGD, steps=6),
    Case("gpt4", Gpt(4, 512, 8, 256, 8192), 4, _ADAMW, steps=6),
    Case("gpt12", Gpt(12, 512, 8, 256, 8192), 4, _ADAMW, steps=3),
    Case("unet", UNet(128, (32, 64, 128, 256), 21), 8, _ADAMW, steps=6),
    Case("mlp", Mlp((64, 128, 128, 10)), 64, _ADAMW, 2000, num_batches=64),
)

# The same networks, smaller: what they show is that it runs.
QUICK = (
    Case("resnet50", ResNet50(64, 100), 4, _SGD, steps=3),
    Case("gpt4", Gpt(4, 128, 4, 64, 1024), 4, _ADAMW, steps=10),
    Case("gpt12", Gpt(12, 128, 4, 64, 1024), 4, _ADAMW, steps=5),
    Case("unet", UNet(64, (8, 16, 32), 21), 4, _ADAMW, steps=10),
    Case("mlp", Mlp((64, 128, 128, 10)), 64, _ADAMW, 500, num_batches=64),
)


def make_batches(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """The data, the same in every process: noise, and labels of no meaning.

    Returns:
        Images float32 [B, H, W, 3], features float32 [B, F] or tokens int32
        [B, T]; and int32 labels, one for each logit vector.
    """
    return list(_batches(case, np.random.default_rng(SEED)))


def _batches(
    case: Case, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rows = case.batch_size
    for _ in range(case.num_batches):
        match case.network:
            case ResNet50(size, classes):
                x = random.normal(size=(rows, size, size, 3))
                y = random.integers(classes, size=rows)
            case Gpt(_, _, _, length, vocabulary):
                text = random.integers(vocabulary, size=(rows, length + 1))
                yield text[:, :-1].astype("int32"), text[:, 1:].astype("int32")
                continue
            case UNet(size, _, classes):
                x = random.normal(size=(rows, size, size, 3))
                y = random.integers(classes, size=(rows, size, size))
            case Mlp(widths):
                x = random.normal(size=(rows, widths[0]))
                y = random.integers(widths[-1], size=rows)
        yield x.astype("float32"), y.astype("int32")
