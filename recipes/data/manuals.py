"""The two manuals in CPython's own documentation, as tfds data sets.

What `topics` holds comes from two books: the Language Reference, which defines
syntax and meaning in prose and grammar, and the Library Reference, which lists
types with a method, its signature and what it returns after the other. A model
that knows one has something to learn from the other.
"""

from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from recipes.data.topics import Topics, split_by_section

# As the files of the Library Reference begin: `stdtypes`, `string`, `pdb`.
_LIBRARY_PREFIXES = ("bltin-", "string-", "types")
_LIBRARY = frozenset(["debugger", "formatstrings", "specialattrs", "truth"])
# "The standard type hierarchy" stands in the Language Reference.
_REFERENCE = frozenset(["types"])


# Unregistered, for the reason that `digits` gives.
class Manuals(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of `manuals/language` and `manuals/library`.

    Features and splits are those of `topics`, of the sections of one manual.
    """

    VERSION = Topics.VERSION
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(
            name="language", description="The Python Language Reference."
        ),
        tfds.core.BuilderConfig(
            name="library", description="The Python Library Reference."
        ),
    ]

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
            homepage="https://docs.python.org/3/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The text is on this machine already.
        from pydoc_data.topics import topics

        train, validation = split_by_section(topics)
        return {
            "train": self._generate_examples(topics, train),
            "validation": self._generate_examples(topics, validation),
        }

    def _generate_examples(self, topics, names: list[str]) -> Iterator:
        wants_library = self.builder_config.name == "library"
        for name in names:
            if is_of_library(name) == wants_library:
                yield name, {"topic": name, "text": topics[name]}


def is_of_library(name: str) -> bool:
    """Whether a section stands in the Library Reference."""
    if name in _REFERENCE:
        return False
    return name in _LIBRARY or name.startswith(_LIBRARY_PREFIXES)
