"""A language model from a file, to be adapted: read and checked."""

import keras

from tfamp.errors import InputError
from tfamp.saving.load import load_model

# What vocabularies are rounded up to, so that products suit the hardware.
_VOCABULARY_MULTIPLE = 128


def read(
    path: str, *, sequence_length: int, tokenizer: str, vocabulary_size: int
) -> keras.Model:
    """Loads a base, and checks that it fits a text.

    Args:
      path: a `.keras` file, such as `recipes.language_model` leaves.
      sequence_length: tokens that it is to see at once.
      tokenizer: name of what makes them.
      vocabulary_size: how many different ones that makes.

    Returns:
      The functional model of tokens [B, T] and logits [B, T, V], not compiled.

    Raises:
      InputError: the file is no such model, or one of another vocabulary, of
        shorter sequences, or quantized.
    """
    try:
        base = load_model(path, compile=False)
    except InputError:
        raise
    except (KeyError, OSError, TypeError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise InputError(f"base={path!r} cannot be loaded: {line}") from None
    _check_ends(base, path)
    length, vocabulary = base.input.shape[1], base.output.shape[2]
    if length is not None and sequence_length > length:
        raise InputError(
            f"sequence_length={sequence_length} exceeds the {length} tokens "
            f"that base={path!r} sees; use {length} or less."
        )
    largest = -(-vocabulary_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if not vocabulary_size <= vocabulary <= largest:
        raise InputError(
            f"base={path!r} has a vocabulary of {vocabulary}, and tokenizer "
            f"{tokenizer!r} one of {vocabulary_size}; use the tokenizer that "
            "the base was trained with."
        )
    for layer in base.layers:
        if layer.quantization_mode is not None:
            raise InputError(
                f"base={path!r} is quantized: layer {layer.name} to "
                f"{layer.quantization_mode}; use the base from before that, "
                "and base_dtype=int8."
            )
    return base


def _check_ends(base: keras.Model, path: str) -> None:
    inputs, outputs = (
        getattr(base, ends, None) or [] for ends in ("inputs", "outputs")
    )
    if (
        isinstance(base, keras.Sequential)
        or [len(x.shape) for x in [*inputs, *outputs]] != [2, 3]
        or not keras.backend.is_int_dtype(inputs[0].dtype)
    ):
        raise InputError(
            f"base={path!r} takes {_described(inputs)} and returns "
            f"{_described(outputs)}; expected a functional model of tokens "
            "[B, T] that returns logits [B, T, V]."
        )


def _described(tensors) -> str:
    return " and ".join(f"{t.shape} {t.dtype}" for t in tensors) or "nothing"
