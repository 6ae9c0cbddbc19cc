"""`ablations.md`: our figures in the layout of the paper's tables."""

import math
import statistics
from collections.abc import Mapping, Sequence

Row = tuple[str, Mapping[str, Sequence[float]]]

# Micikevicius et al. 2018, tables 1 and 2: top-1 accuracy or mean average
# precision, in percent; the text on bigLSTM gives the scale that it needs.
_PAPER = (
    ("AlexNet", "56.77", "", "56.93"),
    ("VGG-D", "65.40", "", "65.43"),
    ("GoogLeNet", "68.33", "", "68.43"),
    ("Inception v2", "70.03", "", "70.02"),
    ("Inception v3", "73.85", "", "74.13"),
    ("ResNet-50", "75.92", "", "76.04"),
    ("Multibox SSD", "76.9", "diverges", "77.1 (scale 8)"),
    ("bigLSTM", "", "diverges", "as float32 (scale 128)"),
)
_PAPERS_FINDINGS = {
    "float32": "the baseline",
    "mixed precision": "matches float32 in all models",
    "with loss scale 128": "enough for bigLSTM",
    "with loss scale 8": "enough for Multibox SSD",
    "without loss scaling": "most models train; SSD and bigLSTM do not",
    "without float32 master weights": (
        "80% worse, relatively, in a speech model"
    ),
    "with float16 sums": "some models need float32 sums",
}
_METRICS = {
    "accuracy": "digits, accuracy (%)",
    "two_heads_accuracy": "two heads, accuracy (%)",
    "image_loss": "two heads, image loss",
}
_LOWER_IS_BETTER = ("image_loss",)

# Differences that are not worth a word: of an accuracy, in percent, one of
# the 360 test images; of a loss a share of it.
_ONE_IMAGE = 100 / 360
_NEGLIGIBLE_SHARE = 0.02


def to_markdown(
    rows: Sequence[Row],
    *,
    seeds: int,
    epochs: int,
    minutes: float,
    environment: Sequence[tuple[str, str]],
) -> str:
    """The page.

    Args:
        rows: name of each arm, float32 first, and by metric the figures of
            all seeds.
        seeds: how many.
        epochs: of each training.
        minutes: that it took.
        environment: label and text, as `environment.rows` has them.
    """
    by_name = dict(rows)
    lines = [
        "# The ablations of Micikevicius et al. 2018 on digits",
        "",
        *(f"- {label}: {text}" for label, text in environment),
        f"- {seeds} seeds, {epochs} epochs, {minutes:.1f} minutes in all",
        "",
        "Figures are test metrics: mean and standard deviation over seeds. "
        '"Two heads" is a network whose second loss has the weight 1e-5 '
        "(`recipes/failures/two_heads.py`).",
        "",
        "## As the paper's tables have it",
        "",
        "| model | float32 | mixed precision, no loss scaling "
        "| mixed precision, loss scaling |",
        "|:--|--:|--:|--:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _PAPER]
    for metric, heading in _METRICS.items():
        figures = [
            _figure(by_name[name][metric], metric)
            for name in ("float32", "without loss scaling", "mixed precision")
        ]
        lines.append(f"| **{heading}** | {' | '.join(figures)} |")
    lines += [
        "",
        "The paper's rows are ImageNet top-1 accuracy, for SSD the mean "
        "average precision on Pascal VOC, both in percent; ours are bold.",
        "",
        "## One thing taken away at a time",
        "",
        f"| | {' | '.join(_METRICS.values())} | the paper's finding | ours |",
        f"|:--|{'--:|' * len(_METRICS)}:--|:--|",
    ]
    baseline = by_name["float32"]
    for name, figures in rows:
        cells = [_figure(figures[metric], metric) for metric in _METRICS]
        ours = "" if name == "float32" else _finding(figures, baseline)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {_PAPERS_FINDINGS[name]} "
            f"| {ours} |"
        )
    lines += [
        "",
        '"As float32" is said where the mean difference between equal seeds '
        "is less than two of its standard errors, or less than one of the 360 "
        "test images, or less than 2% of the loss. With float16 sums every "
        "sum of a matrix product has 10 to 64 terms; those of the paper's "
        "models have thousands.",
    ]
    return "\n".join(lines) + "\n"


def _figure(values: Sequence[float], metric: str) -> str:
    digits = 3 if metric in _LOWER_IS_BETTER else 2
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _finding(
    figures: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
) -> str:
    """What differs from float32, in words."""
    found = []
    for metric, heading in _METRICS.items():
        differences = [
            ours - float32
            for ours, float32 in zip(
                figures[metric], baseline[metric], strict=True
            )
        ]
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        is_loss = metric in _LOWER_IS_BETTER
        negligible = (
            _NEGLIGIBLE_SHARE * statistics.mean(baseline[metric])
            if is_loss
            else _ONE_IMAGE
        )
        if abs(mean) < max(2 * error, negligible):
            continue
        is_better = (mean < 0) == is_loss
        digits = 3 if is_loss else 2
        found.append(
            f"{heading.split(' (')[0]} {'better' if is_better else 'worse'} "
            f"by {abs(mean):.{digits}f}"
        )
    return "; ".join(found) or "as float32"
