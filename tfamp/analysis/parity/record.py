"""`parity.json`: what the runs of all precisions and seeds say together.

Numbers that are not finite are null. "tfamp.parity/1" has

*   `recipe`, `config` (of all runs), `precisions`, `seeds`, `margin`, `alpha`.
*   `metric`: what is judged; null where no run ended with any.
    `greater_is_better`.
*   `equivalent`: precision -> whether equivalence with float32 is shown.
*   `verdict`: all of it in a sentence or two.
*   `runs`: `precision`, `seed`, `metric` (its value at the end), `metrics`
    (all), `seconds`, `status` ("finished", "diverged": the metric is no
    number, "failed": the training gave up) and `reason`.
*   `summary`: per precision `mean` and `standard_deviation` (n - 1) of the
    metric, over the runs that have one.
*   `tests`: per precision the fields of `equivalence.Equivalence`, `margin`,
    `differences` (from float32, by seed), `undecided` (neither equivalence nor
    a difference is shown), `seeds_needed` to decide it (null: none would) and
    `verdict`, a sentence.
*   `noise`: `differences` of the metric between float32 runs of different
    seeds, `largest` and `root_mean_square` of them; and `trajectory`, the
    first such pair's losses compared, as in `divergence`.
*   `divergence`: per run `epsilon`, `first_step`, `at_first_step` as in
    `trajectories.Divergence`; `steps` and `relative_differences`, thinned.
*   `curves`: per run `steps` and `losses`, thinned.
*   `scales`: per run `changes`, pairs of a step and the loss scale from then.
*   `evaluations`: per run `metrics_in`, evaluation precision -> the metric of
    the trained weights; null where it cannot be had, and `reason`.
*   `environment`: see `tfamp.analysis.page.environment`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfamp.analysis.parity import trajectories, words
from tfamp.analysis.parity.equivalence import (
    lies_outside,
    paired_equivalence,
    seeds_needed,
)
from tfamp.analysis.parity.final_metric import (
    BOOKKEEPING,
    choose_metric,
    is_greater_better,
)
from tfamp.analysis.parity.question import REFERENCE, Question

SCHEMA = "tfamp.parity/1"

_POINTS = 200
# The same program on the same weights: agreement to float32's rounding over
# an evaluation set that is summed in another order.
_SAME_METRIC = 1e-5

Run = Mapping[str, Any]


def make(
    runs: Sequence[Run],
    *,
    question: Question,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of all runs.

    Args:
        runs: as `tfamp.analysis.parity.run` leaves them.
        question: what they are to answer.
        config: that they share.
        environment: they ran in.

    Raises:
        InputError: no run has the metric that the question names.
    """
    with_metrics = [run for run in runs if run["metrics"]]
    metric = None
    if with_metrics:
        metric = choose_metric(with_metrics[0]["metrics"], question.metric)
    greater_is_better = question.greater_is_better
    if greater_is_better is None and metric:
        greater_is_better = is_greater_better(metric)
    by_precision = {
        precision: [run for run in runs if run["precision"] == precision]
        for precision in (REFERENCE, *question.others)
    }
    reference = by_precision[REFERENCE]
    tests = [
        _test(
            precision,
            reference,
            by_precision[precision],
            metric,
            greater_is_better,
            question,
        )
        for precision in question.others
    ]
    summary = [
        {"precision": precision, **_summary(group, metric)}
        for precision, group in by_precision.items()
    ]
    return {
        "schema": SCHEMA,
        "recipe": question.recipe,
        "config": dict(config),
        "precisions": list(by_precision),
        "seeds": question.seeds,
        "metric": metric,
        "greater_is_better": greater_is_better,
        "margin": question.margin,
        "alpha": question.alpha,
        "equivalent": {test["precision"]: test["equivalent"] for test in tests},
        "verdict": " ".join(
            words.sentences(tests, metric, question.margin, summary[0]["mean"])
        ),
        "runs": [_outcome(run, metric) for run in runs],
        "summary": summary,
        "tests": tests,
        "noise": _noise(reference, metric),
        "divergence": [
            _name(run) | _divergence(reference[run["seed"]], run)
            for run in runs
            if run["precision"] != REFERENCE
        ],
        "curves": [_name(run) | _curve(run) for run in runs],
        "scales": [
            _name(run) | {"changes": run["scale_changes"]} for run in runs
        ],
        "evaluations": [_name(run) | _evaluation(run, metric) for run in runs],
        "environment": dict(environment),
    }


def _name(run):
    return {"precision": run["precision"], "seed": run["seed"]}


def _value(run, metric):
    return run["metrics"].get(metric)


def _outcome(run, metric):
    value = _value(run, metric)
    status, reason = run["status"], run["reason"]
    if status == "finished" and value is None:
        status, reason = "diverged", f"{metric} at the end is no finite number"
    return _name(run) | {
        "metric": value,
        "metrics": run["metrics"],
        "seconds": run["seconds"],
        "status": status,
        "reason": reason,
    }


def _summary(runs, metric):
    values = [v for run in runs if (v := _value(run, metric)) is not None]
    return {
        "runs": len(values),
        "mean": float(np.mean(values)) if values else None,
        "standard_deviation": _deviation(values),
    }


def _deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _test(precision, reference, others, metric, greater_is_better, question):
    pairs = list(zip(reference, others, strict=True))
    values = [
        [math.nan if (v := _value(run, metric)) is None else v for run in group]
        for group in (reference, others)
    ]
    found = paired_equivalence(
        *values,
        margin=question.margin,
        alpha=question.alpha,
        identical=all(_is_identical(*pair) for pair in pairs),
    )
    differences = np.subtract(values[1], values[0])
    failures = [
        outcome
        for pair in pairs
        for outcome in (_outcome(run, metric) for run in pair)
        if outcome["status"] != "finished"
    ]
    is_undecided = not (
        found.equivalent or failures or lies_outside(found, question.margin)
    )
    more_seeds = None
    if is_undecided:
        more_seeds = seeds_needed(
            found, margin=question.margin, alpha=question.alpha
        )
    return {
        "precision": precision,
        "equivalent": found.equivalent,
        "undecided": is_undecided,
        "seeds_needed": more_seeds,
        "method": found.method,
        "pairs": found.pairs,
        "mean_difference": found.mean_difference,
        "standard_deviation": found.standard_deviation,
        "p_value": found.p_value,
        "confidence_interval": found.confidence_interval,
        "margin": question.margin,
        "differences": [_finite(value) for value in differences],
        "verdict": words.verdict(
            precision,
            found,
            metric=metric,
            greater_is_better=greater_is_better,
            margin=question.margin,
            alpha=question.alpha,
            failures=failures,
            more_seeds=more_seeds,
        ),
    }


def _is_identical(a: Run, b: Run) -> bool:
    """Whether two runs were the same computation, step by step."""
    same_losses = a["steps"] and a["losses"] == b["losses"]
    return bool(same_losses) and _judged(a) == _judged(b)


def _judged(run):
    return {n: v for n, v in run["metrics"].items() if n not in BOOKKEEPING}


def _noise(reference, metric):
    pairs = list(itertools.combinations(reference, 2))
    differences = [
        b - a
        for pair in pairs
        if None
        not in (a := _value(pair[0], metric), b := _value(pair[1], metric))
    ]
    return {
        "differences": differences,
        "largest": max(map(abs, differences), default=None),
        "root_mean_square": (
            float(np.sqrt(np.mean(np.square(differences))))
            if differences
            else None
        ),
        "trajectory": _divergence(*pairs[0]) if pairs else None,
    }


def _divergence(reference, other):
    found = trajectories.compare(
        dict(zip(reference["steps"], reference["losses"], strict=True)),
        dict(zip(other["steps"], other["losses"], strict=True)),
        trajectories.epsilon_of(other["precision"]),
    )
    steps, relative = trajectories.thin(
        found.steps, found.relative_differences, _POINTS
    )
    return {
        "epsilon": found.epsilon,
        "first_step": found.first_step,
        "at_first_step": found.at_first_step,
        "steps": steps,
        "relative_differences": relative,
    }


def _curve(run):
    steps, losses = trajectories.thin(run["steps"], run["losses"], _POINTS)
    return {"steps": steps, "losses": losses}


def _evaluation(run, metric):
    def without(reason):
        return {"metrics_in": None, "reason": reason}

    found = run["evaluations"]
    if found is None:
        return without(run["evaluations_reason"])
    own = found.get(run["precision"], {})
    if metric not in own:
        return without(f"tfamp.evaluate gives no {metric}")
    value = _value(run, metric)
    again = own[metric]
    if None in (value, again) or not math.isclose(
        value, again, rel_tol=_SAME_METRIC, abs_tol=_SAME_METRIC
    ):
        return without(
            f"the recipe ends with {metric} {value}, and tfamp.evaluate of "
            f"its model gives {again}: they are not the same measure"
        )
    return {
        "metrics_in": {p: metrics[metric] for p, metrics in found.items()},
        "reason": None,
    }


def _finite(value):
    return float(value) if math.isfinite(value) else None
