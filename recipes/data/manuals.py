"""The two manuals in CPython's own documentation, as tfds data sets.

What `topics` holds comes from two books: the Language Reference, which defines
syntax and meaning in prose and grammar, and the Library Reference, which lists
types with a method, its signature and what it returns after the other. A model
that knows one has something to learn from the other.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import tensorflow_datasets as tfds

from recipes.data.topics import Topics

# As the files of the Library Reference begin: `stdtypes`, `string`, `pdb`.
_LIBRARY_PREFIXES = ("bltin-", "string-", "types")
_LIBRARY = frozenset(["debugger", "formatstrings", "specialattrs", "truth"])
# "The standard type hierarchy" stands in the Language Reference.
_REFERENCE = frozenset(["types"])


# Unregistered, for the reason that `digits` gives.
class Manuals(Topics, skip_registration=True):
    """Builder of `manuals/language` and `manuals/library`.

    Features and splits are those of `topics`, of the sections of one manual.
    """

    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(
            name="language", description="The Python Language Reference."
        ),
        tfds.core.BuilderConfig(
            name="library", description="The Python Library Reference."
        ),
    ]

    def _generate_examples(
        self, topics: Mapping[str, str], names: list[str]
    ) -> Iterator[tuple[str, dict]]:
        wants_library = self.builder_config.name == "library"
        return super()._generate_examples(
            topics,
            [name for name in names if is_of_library(name) == wants_library],
        )


def is_of_library(name: str) -> bool:
    """Whether a section stands in the Library Reference."""
    if name in _REFERENCE:
        return False
    return name in _LIBRARY or name.startswith(_LIBRARY_PREFIXES)
