"""A SentencePiece model of a text, made in a second."""

import io
import os
import tempfile
from collections.abc import Iterable

from recipes.data.tokens import SentencePieceTokenizer
from tfamp.errors import InputError


def train(texts: Iterable[str], size: int) -> bytes:
    """Finds the subwords of texts: what a SentencePiece .model file holds.

    They are merged from characters by how frequent they are (Sennrich et al.,
    2016), without regard to upper and lower case; what they cannot spell is
    spelled in bytes. The same texts give the same model.

    Args:
      texts: to learn from.
      size: how many tokens; less for a text that has fewer.

    Raises:
      InputError: the texts have fewer subwords than that, or `sentencepiece`
        is not installed.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise InputError(
            "tokenizer='subwords' needs a package that is not installed: pip "
            "install sentencepiece. Or use tokenizer='bytes'."
        ) from None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # It takes a line feed for the end of a sentence.
            sentence_iterator=(
                line for text in texts for line in text.splitlines()
            ),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            normalization_rule_name="nmt_nfkc_cf",
            byte_fallback=True,
            # More threads may break ties in another way.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]
        raise InputError(
            f"vocabulary_size={size} does not suit the text: {reason}"
        ) from None
    return model.getvalue()


def load(model: bytes) -> SentencePieceTokenizer:
    """The tokenizer that such a model makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "subwords.model")
        with open(path, "wb") as file:
            file.write(model)
        return SentencePieceTokenizer(path)
