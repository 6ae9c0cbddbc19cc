"""The page of `benchmarks.gpu`: what was measured, in one table a part."""

from collections.abc import Callable, Iterator
from typing import Any

from tfamp.analysis.page import environment
from tfamp.analysis.parity.equivalence import paired_equivalence

# Of the accuracy; one of the 360 test images is 0.003.
MARGIN = 0.01

_TITLES = {
    "steps": "A step of tfamp",
    "others": "A step of others",
    "recipes": "A step of each recipe",
    "parity": "Parity of the image recipe",
    "several": "Several GPUs",
}


def to_markdown(record: dict[str, Any]) -> str:
    """The page of a record."""
    lines = ["# On a GPU", ""]
    if record["rehearsal"]:
        lines += ["**A rehearsal: tiny sizes on a CPU; no figure counts.**", ""]
    lines += [f"- {label}: {text}" for label, text in environment.rows(record)]
    for part, title in _TITLES.items():
        found = [m for m in record["measurements"] if m["part"] == part]
        if found:
            lines += ["", f"## {title}", "", *_table(found)]
        if part == "parity" and found:
            lines += ["", *_verdicts(found)]
    return "\n".join(lines) + "\n"


def line(measurement: dict[str, Any]) -> str:
    """What a measurement found, in one line."""
    return f"{_name(measurement)}: {_figures(measurement)}"


def _table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| what | precision | found |"
    yield "|---|---|---|"
    for each in sorted(found, key=_name):
        yield f"| {_name(each)} | {_precision(each)} | {_figures(each)} |"


def _name(measurement: dict[str, Any]) -> str:
    match measurement["kind"]:
        case "train":
            what = measurement.get("title", measurement["case"])
            return f"{what}, {measurement['contestant']}"
        case "recipe":
            xla = "XLA" if measurement["xla"] else "no XLA"
            return f"{measurement['recipe']}, {xla}"
        case "parity":
            return f"seed {measurement['seed']}"
        case "scaling":
            return f"ResNet-50, replicas: {measurement['replicas'] or 'all'}"
    return f"all-reduce, replicas: {measurement['replicas'] or 'all'}"


def _precision(measurement: dict[str, Any]) -> str:
    precision = measurement.get("precision") or measurement.get("dtype")
    if precision == "float32" and "tf32" in measurement:
        return f"float32, TF32 {'on' if measurement['tf32'] else 'off'}"
    return str(precision)


_SHOWN: dict[str, Callable[[float], str]] = {
    "step_milliseconds": lambda value: f"{value:.1f} ms",
    "in_memory_step_milliseconds": lambda value: f"{value:.1f} ms in memory",
    "peak_memory_bytes": lambda value: f"{value / 2**30:.2f} GiB",
    "metric": lambda value: f"accuracy {value:.4f}",
    "gigabytes_per_second": lambda value: f"{value:.1f} GB/s",
}


def _figures(measurement: dict[str, Any]) -> str:
    if measurement["status"] != "done":
        return f"{measurement['status']}: {measurement['line']}".replace(
            "|", "/"
        )
    return ", ".join(
        show(measurement[name])
        for name, show in _SHOWN.items()
        if measurement.get(name)
    )


def _verdicts(found: list[dict[str, Any]]) -> Iterator[str]:
    metrics: dict[str, dict[int, float]] = {}
    for each in found:
        if each["status"] == "done":
            by_seed = metrics.setdefault(each["precision"], {})
            by_seed[each["seed"]] = each["metric"]
    reference = metrics.get("float32", {})
    for precision, by_seed in metrics.items():
        seeds = sorted(reference.keys() & by_seed)
        if precision == "float32" or len(seeds) < 2:
            continue
        result = paired_equivalence(
            [reference[seed] for seed in seeds],
            [by_seed[seed] for seed in seeds],
            margin=MARGIN,
        )
        shown = "equivalent" if result.equivalent else "not shown equivalent"
        yield (
            f"{precision} is {shown} to float32 within {MARGIN:g} over "
            f"{len(seeds)} seeds: mean difference "
            f"{result.mean_difference:+.4f}.\n"
        )
