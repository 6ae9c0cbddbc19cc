"""Fine-tunes a language model by low-rank weights beside its frozen ones.

    python -m recipes.lora --precision=mixed_bfloat16

The default needs no download. A decoder of 0.6 million weights first learns
the Language Reference in CPython's own documentation (239 kB, as
`recipes.language_model` does), and is then adapted to the Library Reference
(86 kB; tested on other sections of it, 28 kB). Its weights are frozen, in 16
bits or in int8, and 57 thousand low-rank ones beside them train in float32
(Hu et al., 2021, "LoRA"; with int8 as in Dettmers et al., 2023, "QLoRA").

On one core of a CPU with AVX512-BF16 that other programs used too (AMD EPYC;
Python 3.11.7, TensorFlow 2.21.0, Keras 3.15.1; seed 0), in seconds of CPU
time with start-up, base and samples, and in bits per byte of the test text:

    precision        seconds   base stored in      bytes   base   adapted
    float32          180       float32         2,395,648   2.421   2.264
    mixed_bfloat16   179       bfloat16        1,199,616   2.402   2.236
                     90        int8              649,728   2.401   2.238
    mixed_float16    382       float16         1,199,616   2.405   2.252
                     149       int8              649,728   2.405   2.258

int8 had the base of the line above (--base_dtype=int8 --base=FILE.keras), the
others each one of their own. To train all weights of the float32 base instead
(--rank=0 --learning_rate=2e-4) takes it to 2.248, and with 5e-4 to 2.257. On
the same text it costs 8.00 bits to guess and 4.81 to know how frequent each
byte is. The learning rates were chosen on that text. float16 has no fast path
on CPUs.

With --output_dir it leaves what the base and what the adapted model writes in
samples.txt, the low-rank weights in low_rank.npz, a model that has them merged
into its kernels in model.keras, and the base in base/model.keras. With
--checkpoint_dir a killed run goes on, in the base's training too; checkpoints
of the adaptation leave the base out, and refuse another one.

--base=FILE.keras takes a base of your own, as language_model leaves it, and
--dataset=tiny_shakespeare and the like another text. `tfamp lint` and `probe`
see a base that has learned nothing, and `bench` and `parity` train one in each
run, unless --config.base=FILE names one.
"""

import collections
import dataclasses
import math
import os
from typing import Literal

import keras
import tensorflow as tf

import tfamp
from recipes import (
    base_model,
    language_model,
    low_rank,
    low_rank_file,
    model_file,
)
from tfamp.checkpoint.frozen import frozen_weights
from tfamp.distribute.consensus import is_chief
from tfamp.files.output import output_folder, write_atomically
from tfamp.recipe import flag
from tfamp.training import observers


@dataclasses.dataclass(frozen=True)
class Config(language_model.Config):
    """The flags of this recipe."""

    base: str = flag(
        "", "a language model to adapt, a .keras file; if empty, one is trained"
    )
    base_dataset: str = flag(
        "manuals/language", "text that a base learns which is trained here"
    )
    base_epochs: int = flag(10, "passes over that text", minimum=1)
    base_steps_per_epoch: int = flag(
        0, "after which an epoch of it ends; 0: at its end", minimum=0
    )
    base_dtype: Literal["compute", "float32", "int8"] = flag(
        "compute",
        "what the frozen weights are stored in; compute: the dtype of products",
    )
    dataset: str = flag(
        "manuals/library",
        "text to adapt to; manuals/library, topics or a name of tfds",
    )
    rank: int = flag(
        8, "of the updates; 0 trains the base itself instead", minimum=0
    )
    alpha: float = flag(
        16.0, "updates are multiplied by alpha / rank", minimum=0
    )
    lora_dropout: float = flag(
        0.05, "share of the features before A", minimum=0, below=1
    )
    targets: Literal["attention", "mlp", "all"] = flag(
        "all", "the kernels that get an update"
    )
    num_layers: int = flag(3, "blocks of a base trained here", minimum=1)
    width: int = flag(128, "features of a base trained here", minimum=2)
    epochs: int = flag(10, "passes over the text to adapt to", minimum=1)
    learning_rate: float = flag(
        2e-3, "at its peak, after the warm-up", minimum=0
    )
    warmup_steps: int = flag(50, "of linear warm-up", minimum=0)
    weight_decay: float = flag(0.01, "of A; B is spared", minimum=0)


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (tokens, the token after each), int32 [B, T] both."""
    return language_model.make_datasets(config)


def build_model(config: Config) -> keras.Model:
    """The compiled model: tokens [B, T] to float32 logits [B, T, V].

    Without `config.base` its frozen weights are those of a base that has
    learned nothing yet; `train` trains one first.
    """
    if config.base:
        return adapted(config, read_base(config))
    return adapted(config, language_model.build_model(_base_config(config)))


def adapted(config: Config, base: keras.Model) -> keras.Model:
    """The compiled copy of a base with low-rank weights beside its kernels."""
    model = low_rank.adapt(
        base,
        low_rank.LowRank(
            config.rank,
            config.alpha,
            config.lora_dropout,
            config.targets,
            config.base_dtype,
        ),
        config.sequence_length,
    )
    tfamp.keep_float32(model)

    optimizer = language_model.adamw(config)
    # Where the base itself trains, there is no B and all kernels decay.
    optimizer.exclude_from_weight_decay(
        [
            v
            for v in model.trainable_variables
            if v.name != "kernel" or "_lora_b/" in v.path
        ]
    )
    model.compile(
        optimizer=tfamp.wrap_optimizer(optimizer, shard=config.shard == "on"),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains, evaluates, and writes samples; returns the metrics."""
    strategy = tfamp.recipe.start(config)
    loaded = language_model.load_text(config)
    base = read_base(config) if config.base else train_base(config, strategy)
    # Draw the same from here on after a base that was trained, read, restored.
    keras.utils.set_random_seed(config.seed)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = adapted(config, base)
    tfamp.recipe.print_float32_layers(model)
    _print_sizes(model)
    print(loaded.describe_baselines())
    base_loss = tfamp.evaluate(model, eval_batches)["loss"]
    base_bits = loaded.bits_per_byte(base_loss)
    print(f"bits per byte of the base: {base_bits:.3f}")
    samples = [_samples(model, config)]

    tfamp.recipe.fit(
        model,
        train_batches,
        eval_batches,
        dataclasses.replace(
            config, checkpoint_dir=_inside(config.checkpoint_dir, "low_rank")
        ),
        # The base is read again, or restored from checkpoints of its own.
        checkpoint_frozen=False,
    )
    metrics = tfamp.recipe.final_metrics(model, eval_batches)
    samples.append(_samples(model, config))
    if config.output_dir and is_chief(strategy):
        folder = output_folder(config.output_dir)
        _write_samples(samples, folder)
        low_rank_file.save(model, folder / "low_rank.npz")
        model_file.save(low_rank.merge(model, base), folder / "model.keras")
    return metrics | {
        "bits_per_byte": loaded.bits_per_byte(metrics["loss"]),
        "base_bits_per_byte": base_bits,
    }


def train_base(config: Config, strategy: tf.distribute.Strategy) -> keras.Model:
    """Trains a base as `language_model` does; goes on from its checkpoints.

    With `config.output_dir` it is left there in `base/model.keras`.
    """
    base_config = _base_config(config)
    print(f"training a base on {base_config.dataset}")
    train_batches, eval_batches = language_model.make_datasets(base_config)
    with strategy.scope():
        base = language_model.build_model(base_config)
    # To who watches from outside, this recipe is its fine-tuning.
    with observers.observing(observers.Observer()):
        tfamp.recipe.fit(base, train_batches, eval_batches, base_config)
    if base_config.output_dir and is_chief(strategy):
        folder = output_folder(base_config.output_dir)
        model_file.save(base, folder / "model.keras")
    return base


def read_base(config: Config) -> keras.Model:
    """Loads `config.base`; InputError where it does not fit the text."""
    return base_model.read(
        config.base,
        sequence_length=config.sequence_length,
        tokenizer=config.tokenizer,
        vocabulary_size=language_model.load_text(config).tokenizer.size,
    )


def _base_config(config: Config) -> language_model.Config:
    shared = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(language_model.Config)
    }
    defaults = language_model.Config()
    return language_model.Config(
        **shared
        | {
            "dataset": config.base_dataset,
            "eval_split": "auto",
            "epochs": config.base_epochs,
            "steps_per_epoch": config.base_steps_per_epoch,
            "learning_rate": defaults.learning_rate,
            "warmup_steps": defaults.warmup_steps,
            "weight_decay": defaults.weight_decay,
            "output_dir": _inside(config.output_dir, "base"),
            "checkpoint_dir": _inside(config.checkpoint_dir, "base"),
        }
    )


def _samples(model, config):
    if not config.sample_length:
        return []
    return language_model.sample_texts(model, config)


def _print_sizes(model):
    for what, weights in (
        ("trainable", model.trainable_weights),
        ("frozen", frozen_weights(model)),
    ):
        bytes_of = collections.Counter()
        for weight in weights:
            size = math.prod(weight.shape) * tf.as_dtype(weight.dtype).size
            bytes_of[weight.dtype] += size
        count = sum(math.prod(weight.shape) for weight in weights)
        dtypes = ", ".join(f"{n:,} in {d}" for d, n in bytes_of.items())
        print(
            f"  {what}: {count:,} weights, {bytes_of.total():,} bytes "
            f"({dtypes})"
        )


def _inside(folder: str, name: str) -> str:
    return folder and os.path.join(folder, name)


def _write_samples(samples, folder):
    rule = f"\n{'=' * 80}\n"
    parts = [
        f"{title}{rule}{rule.join(texts)}"
        for title, texts in zip(
            ("The base:", "Fine-tuned:"), samples, strict=True
        )
    ]
    write_atomically(folder / "samples.txt", rule.join(parts) + "\n")


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
