"""Passages of CPython's documentation and the section each is from.

A small classification task with real text and nothing to download: of which
of the larger sections of `pydoc_data.topics` is this passage? The text is
under the license of Python and changes with its version, which is therefore
the version of the data set.
"""

import collections
import re
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds

from recipes.data.topics import Topics, split_by_section

# Sections with fewer characters have too few passages to learn from.
SECTION_CHARACTERS = 7000

# Words and signs of a passage. A line of code has more signs than prose, and
# about as many subwords as it has words and signs.
PASSAGE_WORDS = 48
_WORD = re.compile(r"\w+|[^\w\s]+")

# Passages that stand together in a section go to the same split, so that only
# those at the rim of a group have neighbours in the other one. One group in so
# many is for validation, counted from the middle.
_GROUP = 4
_VALIDATION_STRIDE = 4

# Shorter paragraphs stand in many places and say nothing of them.
_TELLING_CHARACTERS = 40


# Unregistered, for the reason that `digits` gives.
class Passages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of `passages`: a text and the section that it is from.

    Splits: `train` and `validation`, of every section other parts. Paragraphs
    that stand in two places are in neither.
    """

    VERSION = Topics.VERSION

    def _info(self) -> tfds.core.DatasetInfo:
        from pydoc_data.topics import topics

        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "section": tfds.features.ClassLabel(
                        names=large_sections(topics)
                    ),
                }
            ),
            supervised_keys=("text", "section"),
            homepage="https://docs.python.org/3/reference/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The text is on this machine already.
        from pydoc_data.topics import topics

        names = large_sections(topics)
        train, validation = split_passages({n: topics[n] for n in names})
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(
        self, passages: list[tuple[str, str]]
    ) -> Iterator[tuple[int, dict]]:
        for key, (name, text) in enumerate(passages):
            yield key, {"text": text, "section": name}


def large_sections(sections: Mapping[str, str]) -> list[str]:
    """Names of the sections to tell apart, sorted; no excerpts of others."""
    names = sorted(
        name for split in split_by_section(sections) for name in split
    )
    return [n for n in names if len(sections[n]) >= SECTION_CHARACTERS]


def split_passages(
    sections: Mapping[str, str],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Cuts sections into passages, and shares these out, without chance.

    A paragraph that stands in two places, of one section or of two, is left
    out: it has no one label, or would be in both splits.

    Args:
      sections: the text of each section by its name; paragraphs are set apart
        by empty lines.

    Returns:
      The (name, passage) of train and of validation, in the sections' order.
    """
    counts = collections.Counter(
        _one_line(paragraph)
        for text in sections.values()
        for paragraph in text.split("\n\n")
    )
    train, validation = [], []
    for name, text in sections.items():
        kept = [
            paragraph
            for paragraph in text.split("\n\n")
            if counts[_one_line(paragraph)] == 1
            or len(_one_line(paragraph)) < _TELLING_CHARACTERS
        ]
        for i, passage in enumerate(cut("\n\n".join(kept), PASSAGE_WORDS)):
            place = i // _GROUP % _VALIDATION_STRIDE
            is_train = place != _VALIDATION_STRIDE // 2
            (train if is_train else validation).append((name, passage))
    return train, validation


def cut(text: str, size: int) -> list[str]:
    """Cuts a text behind every so many words and signs; the last are fewer."""
    words = list(_WORD.finditer(text))
    return [
        text[words[i].start() : words[min(i + size, len(words)) - 1].end()]
        for i in range(0, len(words), size)
    ]


def _one_line(paragraph: str) -> str:
    return " ".join(paragraph.split())
