"""What a benchmark is to measure, and how."""

import dataclasses
from collections.abc import Mapping

from tfamp.analysis.bench.figures import BASE
from tfamp.errors import InputError
from tfamp.hardware.devices import GIB
from tfamp.precision.policy import PRECISIONS, check_compared


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes:
        recipe: a module or a file, as `tfamp.recipe.load_recipe` takes it.
        settings: fields of its `Config` and their text.
        precisions: float32, what the others are compared with, and others.
        steps: to time in each run, at least.
        rounds: how often each precision is run.
        largest_batch: whether to look for it, too.
        memory_limit_gib: that the process may come to have in the search, on
            a CPU; None on a GPU, which has a limit of its own.
        profile: whether to leave traces for TensorBoard, in `profile`.

    Raises:
        InputError: one of these cannot be used.
    """

    recipe: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    precisions: tuple[str, ...] = PRECISIONS
    steps: int = 20
    rounds: int = 5
    largest_batch: bool = False
    memory_limit_gib: float | None = None
    profile: bool = False

    def __post_init__(self):
        check_compared(self.precisions)
        if BASE not in self.precisions:
            raise InputError(
                f"precisions={','.join(self.precisions)} lacks float32, which "
                "the others are compared with."
            )
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name}={getattr(self, name)} must be at least 1."
                )
        limit = self.memory_limit_gib
        if limit is not None and not 0 < limit < float("inf"):
            raise InputError(
                f"memory_limit_gib={limit:g}; expected more than 0."
            )
        if limit is not None and not self.largest_batch:
            raise InputError(
                "memory_limit_gib is for the search of --largest_batch; "
                "leave it out, or ask for that."
            )

    @property
    def memory_limit_bytes(self) -> int | None:
        gib = self.memory_limit_gib
        return None if gib is None else int(gib * GIB)
