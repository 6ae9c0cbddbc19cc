"""What lint says: findings, and the rules that they break."""

import dataclasses

# From the gravest on.
ERROR = "error"
WARNING = "warning"
INFO = "info"
SEVERITIES = (ERROR, WARNING, INFO)

DTYPES_16 = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Something that lint looks for.

    Attributes:
        name: such as "attention-softmax".
        what: what it finds, and why that matters, in one sentence.
    """

    name: str
    what: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """A place in a model that breaks a rule.

    Attributes:
        rule: the rule's name.
        severity: "error" where training goes wrong, "warning" where it may,
            "info" where it is only slower, or lint could not look.
        layer: the layer's path: the names of the layers around it and its
            own, joined by "/"; "" where it is the model, its optimizer or
            its metrics.
        message: what is wrong, and what comes of it.
        fix: code to paste. `model`, `optimizer`, `dataset` and the like stand
            for the caller's own.
        line: "file.py:12", where own code made what is wrong; "" where none
            did, or it is not known.
    """

    rule: str
    severity: str
    layer: str
    message: str
    fix: str
    line: str = ""
