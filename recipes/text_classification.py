"""Pretrains a transformer on masked tokens, then trains it to classify text.

    python -m recipes.text_classification --precision=mixed_bfloat16

The default needs no download: 425,871 weights learn of which of 15 sections
of CPython's documentation a passage of 48 words is, from 974 passages, and are
tested on 315 others. On one busy core of a CPU with AVX512-BF16 (Python
3.11.7, TensorFlow 2.21.0, Keras 3.15.1), start-up included:

    precision        seconds      (of the core)   accuracy
    float32          214          (108)           0.781
    mixed_bfloat16   127 to 193   (95 to 102)     0.768  0.756  0.778
    mixed_float16    196          (144)           0.784

The seeds are 0, and for mixed_bfloat16 0, 1 and 2. One passage is 0.003, and
the standard error of such an accuracy 0.024. The most frequent section makes
0.203, naive Bayes, which knows how frequent each token is, 0.765. The settings
were chosen on these 315 passages, too.

Pretraining pays where labels are few. In bfloat16, with seed 0:

    labels known                              pretrained   not   naive Bayes
    all 974                                   0.768        0.749   0.765
    97 (--label_share=0.1 --epochs=40)        0.537        0.397   0.463

"not" is --pretrain_epochs=0. Fine-tuning masks tokens as well, which keeps a
model of so few texts general.

With --checkpoint_dir a run goes on in the phase in which it was stopped. With
--output_dir it leaves predictions.txt, filled_in.txt (texts with [masked
token|what the model says]), the classifier in model.keras, its tokenizer in
subwords.model, and in pretraining/ the logs of that phase. `tfamp bench`
times pretraining; with --config.pretrain_epochs=0, fine-tuning.

Real text: --dataset=imdb_reviews --pretrain_split=unsupervised --truncate
--sequence_length=256 --vocabulary_size=8192, or --dataset=glue/sst2 and the
other sets of glue with classes, in pairs too (not measured here).
"""

import dataclasses
import os
from typing import NamedTuple

import keras
import tensorflow as tf
from keras import layers, ops

import tfamp
from recipes import model_file, shown_text, transformer
from recipes.data import images, labelled_text
from recipes.data.labelled_text import LabelledText
from recipes.data.masked_tokens import hide_tokens, mask_tokens
from recipes.rates import warm_cosine
from tfamp.distribute.consensus import is_chief
from tfamp.files.output import output_folder
from tfamp.recipe import flag

# Rows of the embedding table, so that its products suit the hardware.
_VOCABULARY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "passages",
        "passages, or a TensorFlow Datasets name such as imdb_reviews or "
        "glue/sst2",
    )
    eval_split: str = flag("auto", "split to evaluate on; validation or test")
    pretrain_split: str = flag("", "split to pretrain on; the one to train on")
    label_share: float = flag(
        1.0, "of the training texts, whose labels are known", minimum=0
    )
    tokenizer: str = flag(
        "subwords",
        "subwords of the training text, bytes, or a SentencePiece .model file",
    )
    vocabulary_size: int = flag(2048, "of the subwords", minimum=1)
    sequence_length: int = flag(112, "tokens that are seen at once", minimum=1)
    truncate: bool = flag(False, "cut longer texts, which are an error if not")
    num_layers: int = flag(2, "blocks of attention and MLP", minimum=1)
    width: int = flag(96, "features of a token between blocks", minimum=2)
    num_heads: int = flag(3, "of attention, in each block", minimum=1)
    qk_norm: bool = flag(False, "normalize queries and keys")
    dropout: float = flag(0.0, "share of features", minimum=0, below=1)
    masked_share: float = flag(
        0.3, "of the tokens, to predict in pretraining", minimum=0, below=1
    )
    hidden_share: float = flag(
        0.3, "of the tokens, masked in fine-tuning", minimum=0, below=1
    )
    batch_size: int = flag(16, "texts in a step, over all devices", minimum=1)
    pretrain_epochs: int = flag(
        24, "passes of pretraining; 0 leaves it out", minimum=0
    )
    epochs: int = flag(10, "passes over the labelled texts", minimum=1)
    pretrain_learning_rate: float = flag(
        2e-3, "of AdamW, at its peak", minimum=0
    )
    learning_rate: float = flag(3e-3, "likewise, with labels", minimum=0)
    warmup_epochs: float = flag(1.0, "epochs of linear warm-up", minimum=0)
    weight_decay: float = flag(
        0.1, "of kernels; norms and embeddings are spared", minimum=0
    )

    def __post_init__(self):
        super().__post_init__()
        transformer.check_heads(self.width, self.num_heads)
        if self.label_share > 1:
            raise tfamp.InputError(
                f"label_share={self.label_share:g}; expected 1 or less."
            )


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (tokens [B, T], labels [B]), both int32, to fine-tune on.

    Some tokens of the texts to train on are hidden, others in each epoch.
    """
    loaded = _load(config)
    masking = loaded.masking(config.hidden_share)

    def hide(batch, seed):
        tokens, labels = batch
        return hide_tokens(tokens, seed, masking), labels

    train_batches = images.with_seeds(
        loaded.train_batches(loaded.training, config.seed), config.seed
    ).map(hide, tf.data.AUTOTUNE, deterministic=True)
    return (
        train_batches.prefetch(tf.data.AUTOTUNE),
        loaded.eval_batches().prefetch(tf.data.AUTOTUNE),
    )


def build_model(config: Config) -> keras.Model:
    """The compiled classifier: tokens [B, T] to float32 logits [B, C]."""
    loaded = _load(config)
    tokens, encoded = _encoder(config, loaded)
    # In float32: a mean over hundreds of tokens.
    mean = layers.GlobalAveragePooling1D(dtype="float32", name="mean")(
        encoded.features, mask=encoded.is_token
    )
    mean = layers.Dropout(config.dropout, name="mean_dropout")(mean)
    logits = layers.Dense(len(loaded.class_names), name="logits")(mean)
    model = keras.Model(tokens, logits, name="classifier")
    tfamp.keep_float32(model)
    model.compile(
        optimizer=_optimizer(
            config,
            model,
            config.learning_rate,
            config.epochs,
            loaded.steps(loaded.training),
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        auto_scale_loss=False,
    )
    return model


def make_masked_datasets(
    config: Config,
) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches to pretrain on, as `mask_tokens` makes them.

    Other tokens are masked in each epoch, and the same ones at each
    evaluation.
    """
    loaded = _load(config)
    masking = loaded.masking(config.masked_share)

    def mask(batch, seed):
        tokens, _ = batch
        return mask_tokens(tokens, seed, masking)

    train_batches = images.with_seeds(
        loaded.train_batches(loaded.pretraining, config.seed), config.seed
    )
    eval_seeds = tf.data.Dataset.counter().map(lambda i: tf.stack([i, i]))
    eval_batches = tf.data.Dataset.zip(loaded.eval_batches(), eval_seeds)
    return tuple(
        batches.map(mask, tf.data.AUTOTUNE, deterministic=True).prefetch(
            tf.data.AUTOTUNE
        )
        for batches in (train_batches, eval_batches)
    )


def build_masked_model(config: Config) -> keras.Model:
    """The same encoder, compiled to predict masked tokens.

    From tokens [B, T] and places [B, P] to float32 logits [B, P, V]; the
    embedding is the output layer as well.
    """
    loaded = _load(config)
    tokens, encoded = _encoder(config, loaded)
    count = loaded.masking(config.masked_share).num_positions(
        config.sequence_length
    )
    positions = keras.Input([count], dtype="int32", name="positions")
    x = ops.take_along_axis(encoded.features, positions[:, :, None], axis=1)
    x = layers.Dense(config.width, activation="gelu", name="masked_dense")(x)
    x = layers.RMSNormalization(name="masked_norm")(x)
    logits = encoded.embedding(x, reverse=True)
    # The product in 16 bits, what the loss makes of it in float32.
    logits = layers.Activation("linear", dtype="float32", name="masked_logits")(
        logits
    )
    model = keras.Model([tokens, positions], logits, name="masked_model")
    tfamp.keep_float32(model)
    model.compile(
        optimizer=_optimizer(
            config,
            model,
            config.pretrain_learning_rate,
            config.pretrain_epochs,
            loaded.steps(loaded.pretraining),
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="masked_accuracy")
        ],
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Pretrains, fine-tunes, and shows predictions; returns the metrics."""
    strategy = tfamp.recipe.start(config)
    loaded = _load(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    tfamp.recipe.print_float32_layers(model)
    print(
        f"  without a model: accuracy {loaded.majority_accuracy():.4f} by the "
        f"most frequent class, {loaded.naive_bayes_accuracy():.4f} by naive "
        "Bayes"
    )
    checkpoints = _subfolder(config.checkpoint_dir, "fine_tuning")
    # What is saved there began with the pretrained weights.
    is_begun = checkpoints and tf.train.latest_checkpoint(checkpoints)
    if config.pretrain_epochs and not is_begun:
        copy_encoder(_pretrain(config, strategy), model)
    print("fine-tuning")
    tfamp.recipe.fit(
        model,
        train_batches,
        eval_batches,
        dataclasses.replace(config, checkpoint_dir=checkpoints),
    )
    metrics = tfamp.recipe.final_metrics(model, eval_batches)
    if is_chief(strategy):
        texts = shown_text.predictions(model, loaded)
        shown_text.show(texts, config.output_dir, "predictions.txt")
        if config.output_dir:
            _save(model, loaded, output_folder(config.output_dir))
    return metrics


def copy_encoder(source: keras.Model, target: keras.Model) -> None:
    """Gives the layers of `target` the weights of their namesakes."""
    names = {layer.name for layer in source.layers}
    for layer in target.layers:
        if layer.name in names and layer.weights:
            layer.set_weights(source.get_layer(layer.name).get_weights())


def _pretrain(config, strategy) -> keras.Model:
    print("pretraining on masked tokens")
    train_batches, eval_batches = make_masked_datasets(config)
    with strategy.scope():
        model = build_masked_model(config)
    tfamp.recipe.fit(
        model,
        train_batches,
        eval_batches,
        dataclasses.replace(
            config,
            epochs=config.pretrain_epochs,
            output_dir=_subfolder(config.output_dir, "pretraining"),
            checkpoint_dir=_subfolder(config.checkpoint_dir, "pretraining"),
        ),
    )
    if is_chief(strategy):
        texts = shown_text.filled_in(model, eval_batches, _load(config))
        shown_text.show(texts, config.output_dir, "filled_in.txt")
    return model


class _Encoded(NamedTuple):
    """features [B, T, W]; is_token, bool [B, T], False for padding."""

    features: keras.KerasTensor
    is_token: keras.KerasTensor
    embedding: layers.Layer


def _encoder(config, loaded):
    """The tokens that go in, and what becomes of them."""
    embedding = transformer.reversible_embedding()(
        -(-loaded.num_tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        config.width,
        embeddings_initializer=keras.initializers.RandomNormal(
            stddev=config.width**-0.5
        ),
        # Left out, the largest product of the model is one of float32.
        reverse_dtype=keras.config.dtype_policy().compute_dtype,
        name="embedding",
    )
    tokens = keras.Input([config.sequence_length], dtype="int32", name="tokens")
    is_token = ops.not_equal(tokens, loaded.padding)
    x = layers.Dropout(config.dropout, name="embedding_dropout")(
        embedding(tokens)
    )
    for i in range(config.num_layers):
        x = transformer.block(
            x,
            f"block{i}",
            num_heads=config.num_heads,
            num_blocks=config.num_layers,
            causal=False,
            padding_mask=is_token,
            dropout=config.dropout,
            qk_norm=config.qk_norm,
        )
    x = layers.RMSNormalization(name="output_norm")(x)
    return tokens, _Encoded(x, is_token, embedding)


def _optimizer(config, model, learning_rate, epochs, steps_per_epoch):
    optimizer = keras.optimizers.AdamW(
        warm_cosine(
            learning_rate,
            epochs * steps_per_epoch,
            round(config.warmup_epochs * steps_per_epoch),
        ),
        beta_2=0.98,
        weight_decay=config.weight_decay,
        global_clipnorm=1.0,
    )
    optimizer.exclude_from_weight_decay(
        [v for v in model.trainable_variables if v.name != "kernel"]
    )
    return tfamp.wrap_optimizer(optimizer, shard=config.shard == "on")


def _load(config: Config) -> LabelledText:
    return labelled_text.load(
        config.dataset,
        config.data_dir,
        config.eval_split,
        config.pretrain_split,
        config.label_share,
        config.tokenizer,
        config.vocabulary_size,
        labelled_text.Cut(
            config.sequence_length, config.truncate, config.batch_size
        ),
    )


def _subfolder(folder: str, name: str) -> str:
    return os.path.join(folder, name) if folder else ""


def _save(model, loaded, folder):
    model_file.save(model, folder / "model.keras")
    if loaded.subword_model:
        temporary = folder / "new-subwords.model"
        temporary.write_bytes(loaded.subword_model)
        os.replace(temporary, folder / "subwords.model")


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
