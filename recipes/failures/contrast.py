"""A mistake told in full: what is said of it before, and what comes of it."""

import dataclasses
from typing import Any

from recipes import failures
from recipes.failures import curves
from tfamp.analysis.lint.check import lint
from tfamp.analysis.page import plots
from tfamp.analysis.probe.measure import probe
from tfamp.files import output
from tfamp.recipe.subject import open_subject

_PROBED_STEPS = 4


def main(config: Any) -> dict[str, float]:
    """Prints what lint and probe say, trains three times, draws the losses.

    With the mistake and mended, both in `config.precision`, and with the
    mistake in float32. Where `config.output_dir` is given, `failures.svg` is
    left there.

    Args:
        config: a `recipes.failures.Config`; its `healed` does not matter.

    Returns:
        The last training loss of each.

    Raises:
        InputError: the folder cannot be written, matplotlib is needed for
            the picture and not installed, or the config cannot be used.
    """
    failure = failures.FAILURES[config.failure]
    folder = None
    if config.output_dir:
        plots.require_matplotlib()
        folder = output.output_folder(config.output_dir)
        output.make_folder(folder)
    config = dataclasses.replace(config, output_dir="")
    print(f"{config.failure}: {failure.title}\n")
    mistake = dataclasses.replace(config, healed=False)
    mended = dataclasses.replace(config, healed=True)
    for heading, each in (("with the mistake", mistake), ("mended", mended)):
        print(f"Before training, {heading}")
        _print_advice(each)
        print()
    float32 = dataclasses.replace(mistake, precision="float32")
    drawn = [
        _train("with the mistake", "x", plots.MORE_COLORS[2], mistake),
        _train("mended", "o", plots.MORE_COLORS[0], mended),
        _train("float32", ".", plots.COLORS["float32"], float32),
    ]
    print()
    print(curves.as_text(drawn, failure.curve))
    last = [curve.losses[-1] for curve in drawn]
    print(f"\n{_conclusion(failure.curve, *last)}")
    if folder:
        svg = curves.as_svg(drawn, failure.curve, failure.title)
        output.write_atomically(folder / "failures.svg", svg)
        print(f"wrote {folder / 'failures.svg'}")
    names = ("loss_with_mistake", "loss_mended", "loss_float32")
    return dict(zip(names, last, strict=True))


def _print_advice(config: Any) -> None:
    subject = open_subject(failures, config)
    batch = next(iter(subject.train_batches))
    findings = lint(subject.model, batch)
    print(f"lint: {len(findings)} findings")
    for finding in findings:
        layer = f" {finding.layer}" if finding.layer else ""
        print(f"  {finding.severity} {finding.rule}{layer}: {finding.message}")
        for line in finding.fix.splitlines():
            print(f"      {line}")
    report = probe(subject.model, subject.train_batches, steps=_PROBED_STEPS)
    print(
        f"probe: {report.recommended_precision}, loss scale "
        f"{report.recommended_scale:g}"
    )
    print(f"  {report.reason}")
    for layer in report.float32_layers:
        print(f"  float32: {layer}")


def _train(name: str, mark: str, color: str, config: Any) -> curves.Curve:
    print(f"Training, {name}")
    subject = open_subject(failures, config)
    history = failures.fit(subject.model, subject.train_batches, config)
    losses = history.history[failures.FAILURES[config.failure].curve]
    return curves.Curve(name, mark, color, [float(loss) for loss in losses])


def _conclusion(
    name: str, with_mistake: float, mended: float, float32: float
) -> str:
    return (
        f"With the mistake {name} ends at {with_mistake:.3g}, mended at "
        f"{mended:.3g}, in float32 at {float32:.3g}."
    )
