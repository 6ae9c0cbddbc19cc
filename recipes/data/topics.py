"""The documentation that CPython carries, as a tfds data set.

`help("while")` shows sections of the Python language reference, which come
with every CPython as the module `pydoc_data.topics`: some 79 sections, 465
kilobytes of English and code. Nothing is downloaded. The text is under the
license of Python and changes with its version, which is therefore the version
of the data set.
"""

import collections
import sys
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds

# Shorter paragraphs say nothing of where they come from: "For example:".
_TELLING_CHARACTERS = 40

# From this share on, a section is taken for an excerpt of the other one.
_EXCERPT_SHARE = 0.75

# One section in so many, by size, is for validation, counted from the middle
# so that neither the largest nor the smallest is.
_VALIDATION_STRIDE = 5


# Unregistered, for the reason that `digits` gives.
class Topics(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of `topics`: the name of a topic and its text.

    Splits: `train` and `validation`, whole sections each, without a paragraph
    in common.
    """

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "topic": tfds.features.Text(),
                    "text": tfds.features.Text(),
                }
            ),
            homepage="https://docs.python.org/3/reference/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The text is on this machine already.
        from pydoc_data.topics import topics

        train, validation = split_by_section(topics)
        return {
            "train": self._generate_examples(topics, train),
            "validation": self._generate_examples(topics, validation),
        }

    def _generate_examples(
        self, topics: Mapping[str, str], names: list[str]
    ) -> Iterator[tuple[str, dict]]:
        for name in names:
            yield name, {"topic": name, "text": topics[name]}


def split_by_section(
    sections: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """Shares sections out to train and validation, without chance.

    Some sections are excerpts of others ("if" of "compound"): these are left
    out, so that no text is there twice. Of the others, those that share a
    paragraph with another section are for training, and so are four out of
    five of the rest, taken by size.

    Args:
      sections: the text of each section by its name; paragraphs are set apart
        by empty lines.

    Returns:
      The names of the train and of the validation sections, sorted.
    """
    paragraphs = {name: _paragraphs(text) for name, text in sections.items()}
    by_size = sorted(sections, key=lambda name: (-len(sections[name]), name))
    kept = []
    for name in by_size:
        if not any(
            _is_excerpt(paragraphs[name], paragraphs[larger]) for larger in kept
        ):
            kept.append(name)
    counts = collections.Counter(p for name in kept for p in paragraphs[name])
    alone = [
        name for name in kept if all(counts[p] == 1 for p in paragraphs[name])
    ]
    validation = alone[_VALIDATION_STRIDE // 2 :: _VALIDATION_STRIDE]
    return sorted(set(kept) - set(validation)), sorted(validation)


def _paragraphs(text: str) -> set[str]:
    """The telling paragraphs, without line breaks and indentation."""
    paragraphs = (" ".join(p.split()) for p in text.split("\n\n"))
    return {p for p in paragraphs if len(p) >= _TELLING_CHARACTERS}


def _is_excerpt(paragraphs: set[str], larger: set[str]) -> bool:
    """Whether the greater part of a section stands in a larger one."""
    shared = sum(map(len, paragraphs & larger))
    return shared > 0 and shared >= _EXCERPT_SHARE * sum(map(len, paragraphs))
