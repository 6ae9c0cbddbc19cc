"""Texts for a person to read: what a classifier said, what was filled in."""

import keras
import numpy as np
import tensorflow as tf

from recipes.data.labelled_text import LabelledText
from recipes.data.tokens import ByteTokenizer
from tfamp.files.output import output_folder, write_atomically

_WRITTEN_TEXTS = 20
_PRINTED_TEXTS = 2


def show(texts: list[str], output_dir: str, file_name: str) -> None:
    """Prints some, and writes all where there is a folder."""
    for text in texts[:_PRINTED_TEXTS]:
        print("  " + " ".join(text.split()))
    if output_dir:
        rule = f"\n{'=' * 80}\n"
        path = output_folder(output_dir) / file_name
        write_atomically(path, rule.join(texts) + "\n")


def predictions(model: keras.Model, loaded: LabelledText) -> list[str]:
    """Texts from all over the split, below their label and the predicted one.

    Args:
      model: from tokens to logits.
      loaded: the texts.
    """
    tokens, labels = _some(loaded.eval_batches(), loaded)
    logits = model(tokens, training=False)
    return label_texts(loaded, tokens, labels, keras.ops.softmax(logits))


def filled_in(
    model: keras.Model, batches: tf.data.Dataset, loaded: LabelledText
) -> list[str]:
    """Texts with [what was there|what the model says] in the chosen places.

    Args:
      model: from tokens and places to logits.
      batches: the texts that are evaluated on, as `mask_tokens` makes them.
      loaded: where they are from.
    """
    (tokens, positions), targets, weights = _some(batches, loaded)
    logits = model([tokens, positions], training=False).numpy()
    found = np.argmax(logits[..., : loaded.tokenizer.size], axis=-1)
    return mark_texts(loaded, tokens, positions, targets, weights, found)


def label_texts(loaded, tokens, labels, probabilities) -> list[str]:
    """Each text below its label and the most probable one.

    Args:
      loaded: where the texts are from.
      tokens: [B, T].
      labels: [B].
      probabilities: of the classes, [B, C].
    """
    found = np.argmax(probabilities, axis=1)
    names = loaded.class_names
    return [
        f"{'right' if label == guess else 'wrong'}: {names[label]}, predicted "
        f"{names[guess]} with probability {of_classes[guess]:.2f}\n\n"
        + _decode(loaded, text)
        for text, label, guess, of_classes in zip(
            np.array(tokens),
            np.array(labels),
            found,
            np.array(probabilities),
            strict=True,
        )
    ]


def mark_texts(loaded, tokens, positions, targets, weights, found) -> list[str]:
    """Texts with [target|found] in the places that have a weight.

    Args:
      loaded: where the texts are from.
      tokens: some masked, [B, T].
      positions, targets, weights, found: of the chosen ones, [B, P] each.
    """
    decode = loaded.tokenizer.decode
    # Subwords lose the space before them where they are decoded alone.
    joint = "" if isinstance(loaded.tokenizer, ByteTokenizer) else " "
    texts = []
    for row, places, true, is_chosen, guesses in zip(
        np.array(tokens),
        np.array(positions),
        np.array(targets),
        np.array(weights) > 0,
        found,
        strict=True,
    ):
        pieces, begin = [], 0
        for i in np.argsort(places):
            if is_chosen[i]:
                pieces.append(_decode(loaded, row[begin : places[i]]))
                pieces.append(f"[{decode([true[i]])}|{decode([guesses[i]])}]")
                begin = places[i] + 1
        pieces.append(_decode(loaded, row[begin:]))
        texts.append(joint.join(filter(None, pieces)))
    return texts


def _some(batches, loaded):
    """A batch of texts from all over the split."""
    count = len(loaded.evaluation.labels)
    stride = max(count // _WRITTEN_TEXTS, 1)
    some = batches.unbatch().shard(stride, 0).batch(_WRITTEN_TEXTS)
    return next(iter(some))


def _decode(loaded, tokens: np.ndarray) -> str:
    """The text; of two, each on a line."""
    tokens = tokens[tokens != loaded.padding]
    ends = np.flatnonzero(tokens == loaded.tokenizer.separator)
    parts = [part.tolist() for part in np.split(tokens, ends)]
    separator = loaded.tokenizer.separator
    return "\n".join(
        loaded.tokenizer.decode([t for t in part if t != separator])
        for part in parts
    ).rstrip("\n")
