"""What `tfamp parity` asks of a recipe."""

import dataclasses
from collections.abc import Mapping, Sequence

from tfamp.analysis.parity.equivalence import check_test
from tfamp.errors import InputError
from tfamp.precision.policy import PRECISIONS, check_compared

REFERENCE = "float32"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of a recipe.

    Attributes:
        recipe: a module or a file, as `tfamp.recipe.load_recipe` takes it.
        settings: fields of its `Config` and their text.
        precisions: float32, the reference, and others; the path of a
            `tune.json` is one.
        seeds: how many: 0, 1, and so on.
        margin: the largest difference of the metric that does not matter, in
            the metric's own unit.
        metric: of those that `train` returns; None to choose by name.
        greater_is_better: None to tell by the metric's name.
        alpha: the chance to call equivalent what differs by the margin.

    Raises:
        InputError: one of these cannot be used.
    """

    recipe: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    precisions: Sequence[str] = PRECISIONS
    seeds: int = 5
    margin: float = 0.01
    metric: str | None = None
    greater_is_better: bool | None = None
    alpha: float = 0.05

    def __post_init__(self):
        check_test(self.margin, self.alpha)
        if self.seeds < 1:
            raise InputError(f"seeds={self.seeds} must be at least 1.")
        if path := self.settings.get("precision_map"):
            raise InputError(
                f"--precision_map={path} would be float32's too; name it as a "
                f"precision: --precisions=float32,mixed_bfloat16,{path}."
            )
        check_compared(self.precisions, takes_maps=True)
        if REFERENCE not in self.precisions or len(self.precisions) < 2:
            raise InputError(
                f"precisions={','.join(self.precisions)}; expected "
                f"{REFERENCE}, the reference, and at least one other."
            )

    @property
    def others(self) -> list[str]:
        """The precisions that are compared with float32."""
        return [name for name in self.precisions if name != REFERENCE]
