"""What is varied, one thing at a time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Series:
    """One thing that is varied while all else stays.

    Attributes:
        name: as the flag has it.
        what: the title of its plot.
        unit: of its values.
        values: the largest last.
        steps: of a timed epoch.
        variants: who trains: "tfamp"; "tfamp_single", with one step in a
            graph call; "keras", stock `Model.fit`; "keras_loop", with all
            steps of an epoch in one call; "function", a `tf.function` of one
            step in a Python loop; "graph", a loop inside of one.
        own_processes: each value needs devices or workers of its own.
    """

    name: str
    what: str
    unit: str
    values: tuple[int, ...]
    steps: int
    variants: tuple[str, ...] = ("tfamp",)
    own_processes: bool = False

    @property
    def is_line(self) -> bool:
        """Whether a fixed cost and one of each unit describe it."""
        return len(self.values) > 2 and not self.own_processes


SERIES = (
    Series("layers", "Layers of a GPT", "layers", (1, 2, 4, 8), steps=10),
    Series("batch", "Batch of a GPT", "sequences", (1, 2, 4, 8, 16), steps=10),
    Series(
        "microbatches",
        "Microbatches, of a batch of 16",
        "microbatches",
        (1, 2, 4, 8, 16),
        steps=6,
    ),
    Series(
        "variables",
        "Variables, of 64 numbers each",
        "variables",
        (10, 100, 500, 1000, 2000),
        steps=30,
        variants=("tfamp", "keras"),
    ),
    Series(
        "replicas",
        "Replicas that share one CPU and a batch of 16",
        "replicas",
        (1, 2, 4),
        steps=6,
        own_processes=True,
    ),
    Series(
        "workers",
        "Worker processes that share one CPU and a batch of 16",
        "workers",
        (1, 2),
        steps=6,
        own_processes=True,
    ),
    Series(
        "loop",
        "The loop around an almost empty step",
        "model",
        (1,),
        steps=2000,
        variants=(
            "tfamp",
            "tfamp_single",
            "keras",
            "keras_loop",
            "function",
            "graph",
        ),
    ),
)
