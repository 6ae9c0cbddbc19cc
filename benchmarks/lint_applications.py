"""What `tfamp lint` finds in the models of `keras.applications`.

    python -m benchmarks.lint_applications --output=applications.md

Builds each without weights, under mixed_float16, at the smallest input that it
takes, with its classifier, in a process of its own. Prints a Markdown table of
the rules with how often each was found; a model on which lint fails, or takes
too long, is told as such.
"""

import dataclasses
import inspect
import json
import pathlib
import subprocess
import sys
import time

import tfamp
from tfamp.recipe import flag

# The first that a model accepts is taken.
_SIZES = (32, 48, 71, 75, 96, 128, 160, 224, 331)

_PROGRAM = """
import collections, json, sys
import keras
import tfamp
make = getattr(keras.applications, sys.argv[1])
for size in json.loads(sys.argv[2]):
    # Which clear_session would forget.
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make(weights=None, input_shape=(size, size, 3))
        break
    except ValueError as error:
        keras.backend.clear_session()
        problem = error
else:
    raise problem
findings = tfamp.lint(model)
print(json.dumps({
    "size": size,
    "layers": len(model.layers),
    "rules": collections.Counter(
        f"{each.rule} ({each.severity})" for each in findings
    ),
}))
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    models: tuple[str, ...] = flag((), "names; none for all there are")
    timeout_seconds: int = flag(300, "for each model", minimum=1)
    output: str = flag("", "file for the table as well; none if empty")


def main(config: Config) -> dict[str, float]:
    """Lints each model and prints the table; returns how many did not end."""
    names = config.models or _all_models()
    rows, failed = [], 0
    for name in names:
        result = _lint(name, config.timeout_seconds)
        failed += isinstance(result, str)
        rows.append(_row(name, result))
        print(rows[-1], flush=True)
    head = [
        "| model | input | layers | findings |",
        "|:--|--:|--:|:--|",
    ]
    table = "\n".join([*head, *rows])
    if config.output:
        pathlib.Path(config.output).write_text(table + "\n")
    return {"models": len(rows), "failed": failed}


def _all_models() -> list[str]:
    import keras

    return [
        name
        for name, value in vars(keras.applications).items()
        if inspect.isfunction(value)
    ]


def _lint(name: str, timeout_seconds: int) -> dict | str:
    """What was found, or in one line why nothing was."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, name, json.dumps(_SIZES)],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {time.monotonic() - began:.0f} s"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, result: dict | str) -> str:
    if isinstance(result, str):
        return f"| {name} | | | **{result}** |"
    found = ", ".join(
        f"{rule} x {count}" for rule, count in result["rules"].items()
    )
    return (
        f"| {name} | {result['size']} | {result['layers']} "
        f"| {found or 'none'} |"
    )


if __name__ == "__main__":
    tfamp.recipe.main(main, Config)
