"""Trains a GPT on text: on bytes, or on the subwords of a tokenizer.

    python -m recipes.language_model --precision=mixed_bfloat16

The default needs no download: 1.8 million weights learn the bytes of 48
sections of CPython's documentation (324 kB), and are tested on 10 others (49
kB). On 4 cores of a CPU with AVX512-BF16 (Python 3.11.7, TensorFlow 2.21.0,
Keras 3.15.1), start-up and samples included, while other programs ran beside,
seed 0:

    precision        seconds   bits per byte
    float32          327       1.983
    mixed_bfloat16   222       1.954
    mixed_float16    343       1.976

What differs between precisions is within what differs between seeds (1.956
for 1 and 1.973 for 2 in bfloat16), and between two orders of summing up
(float32 also ended at 1.969, bfloat16 at 1.965). float16 has no fast path on
CPUs. float8, of which a CPU has the numbers and not the speed, was trained for
400 steps at a width of 64 (benchmarks/results/float8.md): over three seeds
2.295 nats a byte, float32 2.297.

On the same split it costs 8.00 bits to guess and 4.76 to know how frequent
each byte is; 2.30 as the best n-gram model does (Witten-Bell, order 5); and
1.92 as `xz -9e` does that has read the training text, of which it sees all at
once where the model sees 128 bytes (`python -m benchmarks.text_baselines`).

With --output_dir it leaves four texts in samples.txt and the model in
model.keras. Real text: --dataset=tiny_shakespeare, or --dataset=wiki40b/en or
lm1b with --steps_per_epoch=10000 --eval_steps=100 and, for subwords,
--tokenizer=FILE.model, a SentencePiece model (not measured here).
"""

import dataclasses

import keras
import tensorflow as tf
from keras import layers

import tfamp
from recipes import model_file, transformer
from recipes.data import corpus
from recipes.generation import generate
from recipes.rates import warm_cosine
from tfamp.distribute.consensus import is_chief
from tfamp.files.output import output_folder, write_atomically
from tfamp.recipe import flag

# Rows of the embedding table, so that its products suit the hardware.
_VOCABULARY_MULTIPLE = 64

_SAMPLES = 4
_SHOWN_LINES = 8


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "topics", "topics, or a text data set of TensorFlow Datasets"
    )
    eval_split: str = flag("auto", "split to evaluate on; validation or test")
    tokenizer: str = flag("bytes", "bytes, or a SentencePiece .model file")
    vocabulary_size: int = flag(
        0, "rows of the embedding; 0: as many as the tokenizer needs", minimum=0
    )
    sequence_length: int = flag(128, "tokens that are seen at once", minimum=1)
    num_layers: int = flag(4, "blocks of attention and MLP", minimum=1)
    width: int = flag(192, "features of a token between blocks", minimum=2)
    num_heads: int = flag(4, "of attention, in each block", minimum=1)
    qk_norm: bool = flag(False, "normalize queries and keys")
    tie_embeddings: bool = flag(True, "one table for tokens in and out")
    dropout: float = flag(0.1, "share of features", minimum=0, below=1)
    batch_size: int = flag(
        16, "sequences in a step, over all devices", minimum=1
    )
    epochs: int = flag(8, "passes over the training data", minimum=1)
    steps_per_epoch: int = flag(
        0, "after which an epoch ends; 0: at the end of the text", minimum=0
    )
    eval_steps: int = flag(
        0, "batches to evaluate on; 0: the whole split", minimum=0
    )
    learning_rate: float = flag(
        2e-3, "at its peak, after the warm-up", minimum=0
    )
    warmup_steps: int = flag(100, "of linear warm-up", minimum=0)
    weight_decay: float = flag(
        0.1, "of kernels; norms and embeddings are spared", minimum=0
    )
    prompt: str = flag("", "what the sample text begins with")
    temperature: float = flag(
        0.8, "of the sample text; 0: the most probable", minimum=0
    )
    sample_length: int = flag(
        400, "tokens of a sample text; 0: none", minimum=0
    )


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (tokens, the token after each), int32 [B, T] both."""
    loaded = load_text(config)
    return loaded.train_batches(config.seed), loaded.eval_batches()


def build_model(config: Config) -> keras.Model:
    """The compiled decoder: tokens [B, T] to float32 logits [B, T, V]."""
    loaded = load_text(config)
    model = decoder(config, _vocabulary_size(config, loaded.tokenizer))
    tfamp.keep_float32(model)

    optimizer = adamw(config)
    optimizer.exclude_from_weight_decay(
        [v for v in model.trainable_variables if v.name != "kernel"]
    )
    model.compile(
        optimizer=tfamp.wrap_optimizer(optimizer, shard=config.shard == "on"),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    return model


def adamw(config: Config) -> keras.optimizers.AdamW:
    """The optimizer, not built, for as many steps as the config makes."""
    steps = config.epochs * load_text(config).steps_per_epoch
    return keras.optimizers.AdamW(
        warm_cosine(config.learning_rate, steps, config.warmup_steps, end=0.1),
        beta_2=0.98,
        weight_decay=config.weight_decay,
        global_clipnorm=1.0,
    )


def decoder(config: Config, vocabulary_size: int) -> keras.Model:
    """A GPT of pre-norm blocks; the embedding is its output layer as well."""
    embedding = transformer.reversible_embedding()(
        vocabulary_size,
        config.width,
        tie_weights=config.tie_embeddings,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        # Left out, the largest product of the model is one of float32.
        reverse_dtype=keras.config.dtype_policy().compute_dtype,
        name="embedding",
    )
    inputs = keras.Input([config.sequence_length], dtype="int32")
    x = layers.Dropout(config.dropout, name="embedding_dropout")(
        embedding(inputs)
    )
    for i in range(config.num_layers):
        x = transformer.block(
            x,
            f"block{i}",
            num_heads=config.num_heads,
            num_blocks=config.num_layers,
            causal=True,
            dropout=config.dropout,
            qk_norm=config.qk_norm,
        )
    x = layers.RMSNormalization(name="output_norm")(x)
    logits = embedding(x, reverse=True)
    # The product in 16 bits, what the loss makes of it in float32.
    logits = layers.Activation("linear", dtype="float32", name="logits")(logits)
    return keras.Model(inputs, logits, name="decoder")


def train(config: Config) -> dict[str, float]:
    """Trains, evaluates, and writes samples; returns the metrics."""
    strategy = tfamp.recipe.start(config)
    loaded = load_text(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    tfamp.recipe.print_float32_layers(model)
    print(loaded.describe_baselines())
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    metrics = tfamp.recipe.final_metrics(model, eval_batches)

    samples = sample_texts(model, config) if config.sample_length else []
    if is_chief(strategy):
        _show(samples)
        if config.output_dir:
            folder = output_folder(config.output_dir)
            _write_samples(samples, folder)
            model_file.save(model, folder / "model.keras")
    return metrics | {"bits_per_byte": loaded.bits_per_byte(metrics["loss"])}


def sample_texts(model: keras.Model, config: Config) -> list[str]:
    """What the model writes after `config.prompt`, several times."""
    tokenizer = load_text(config).tokenizer
    # As at the beginning of a text, which follows the end of another.
    prompt = [tokenizer.separator, *tokenizer.encode(config.prompt)]
    drawn = generate(
        model,
        [prompt] * _SAMPLES,
        config.sample_length,
        sequence_length=config.sequence_length,
        temperature=config.temperature,
        vocabulary_size=tokenizer.size,
        seed=config.seed,
    )
    return [tokenizer.decode(row[1:].tolist()) for row in drawn]


def load_text(config: Config) -> corpus.Corpus:
    """The text that a config names, cut as it says."""
    return corpus.load(
        config.dataset,
        config.data_dir,
        config.eval_split,
        config.tokenizer,
        corpus.Cut(
            config.sequence_length,
            config.batch_size,
            config.steps_per_epoch,
            config.eval_steps,
        ),
    )


def _vocabulary_size(config, tokenizer):
    if not config.vocabulary_size:
        return -(-tokenizer.size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if config.vocabulary_size < tokenizer.size:
        raise tfamp.InputError(
            f"vocabulary_size={config.vocabulary_size} is less than the "
            f"{tokenizer.size} tokens of tokenizer {config.tokenizer!r}; use "
            f"{tokenizer.size} or more, or 0."
        )
    return config.vocabulary_size


def _show(samples):
    for line in samples[0].split("\n")[:_SHOWN_LINES] if samples else []:
        print(f"  {line}")


def _write_samples(samples, folder):
    rule = f"\n{'=' * 80}\n"
    write_atomically(folder / "samples.txt", rule.join(samples) + "\n")


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
