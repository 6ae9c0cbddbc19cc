"""Who trains: a framework and the way it is used, one record each.

A new one is a record here; where its way is new, a few lines in
`keras_training` or `torch_training`.
"""

import dataclasses

from tfamp.errors import InputError


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        name: as the flag has it.
        framework: "keras", "tfamp" or "torch": whose loop it is.
        what: in words, for the table.
        compiled: by XLA, or by `torch.compile`.
        whole_epochs: an epoch is one graph call; of stock Keras, for which
            the others have no such switch.
        optimized: by `tfamp.optimize`; of tfamp.
        bare_optimizer: no LossScaleOptimizer around it; of tfamp.
        plain: without XLA on GPUs too; of tfamp, which compiles there.
    """

    name: str
    framework: str
    what: str
    compiled: bool = False
    whole_epochs: bool = False
    optimized: bool = False
    bare_optimizer: bool = False
    plain: bool = False


CONTESTANTS = (
    Contestant("keras", "keras", "Model.fit"),
    Contestant(
        "keras_loop",
        "keras",
        "Model.fit, steps_per_execution of a whole epoch",
        whole_epochs=True,
    ),
    Contestant("keras_xla", "keras", "Model.fit, XLA", compiled=True),
    Contestant(
        "keras_loop_xla",
        "keras",
        "Model.fit, steps_per_execution of a whole epoch, XLA",
        compiled=True,
        whole_epochs=True,
    ),
    # As it comes: XLA on GPUs, none on CPUs.
    Contestant("tfamp", "tfamp", "tfamp.fit"),
    Contestant(
        "tfamp_optimized",
        "tfamp",
        "tfamp.fit after tfamp.optimize",
        optimized=True,
    ),
    Contestant("tfamp_xla", "tfamp", "tfamp.fit, XLA", compiled=True),
    Contestant(
        "tfamp_bare",
        "tfamp",
        "tfamp.fit of a model with Keras's train_step and the bare optimizer",
        bare_optimizer=True,
    ),
    Contestant("torch", "torch", "PyTorch, eager"),
    Contestant("torch_compile", "torch", "PyTorch, compiled", compiled=True),
)


def choose(names: tuple[str, ...], known: tuple, what: str) -> tuple:
    """The records of these names, in the order of `known`.

    Args:
        names: each once; none for all.
        known: records with a `name`.
        what: a name of one of them stands for, for the message.

    Raises:
        InputError: a name is unknown, or comes twice.
    """
    available = [each.name for each in known]
    for name in names:
        if name not in available:
            raise InputError(
                f"Unknown {what} {name!r}; expected some of "
                f"{', '.join(available)}."
            )
        if names.count(name) > 1:
            raise InputError(f"{what.capitalize()} {name!r} is named twice.")
    return tuple(each for each in known if not names or each.name in names)
