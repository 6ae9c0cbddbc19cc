"""`bench.json`: what the runs of a benchmark come to.

*   `schema`: "tfamp.bench/1".
*   `recipe`, `config` (what was set), `steps` and `rounds`.
*   `environment`: as `tfamp.analysis.page.environment` describes it.
    `devices`: how many it ran on.
*   `runs`: of each process `name` (the precision, or "float32_tf32_off"),
    `precision`, `tf32`, `round`, `batch_size`, `step_milliseconds` (the median
    over `windows`, pairs of steps and seconds), `examples_per_second`,
    `compile_seconds` (the first call less a steady step),
    `in_memory_step_milliseconds`, `input_share`, `peak_memory_bytes` (of the
    fullest GPU; on a CPU, resident memory of the process),
    `memory_growth_bytes` (on a CPU: over what it was before training),
    `skipped_steps`, `warm_up_steps` and `timed_steps`, `product_rate`
    (operations a second in large products, measured).
*   `summary`: by name, of each figure median, quartiles, lowest and highest
    over the rounds.
*   `ratios`: by name, `time`, `memory` and `memory_growth` as parts of those of
    float32 in the same round and at the same batch, with their spread.
*   `flops_per_step` (null, and `flops_reason`, where they cannot be counted),
    `dimension_multiple`, `off_multiple`: the share of them in products with a
    width that is no multiple of it.
*   `published_peaks`: by name, operations a second of one device, the vendor's
    figures; null where they are not known here.
*   `shares`: by name, `product_share` and `peak_share`: of the measured and of
    the published rate, reached over a step.
*   `trained_precisions`: by name, what the model's layers computed in.
*   `callouts`: `rule`, `name`, `measured`, `limit` and `message`; by name,
    `decisions` ("faster", "slower", "same", "undecided") and `verdicts`, a
    sentence.
*   `largest_batches`: by name, `rows`, and `fails`, the smallest batch that
    did not fit (null if all did); null where it was not asked for.
    `memory_limit_bytes` goes with it.
"""

from typing import Any

from tfamp.analysis.bench import callouts, figures, peaks
from tfamp.analysis.bench.plan import Plan
from tfamp.analysis.page import environment
from tfamp.hardware.devices import Hardware

SCHEMA = "tfamp.bench/1"


def make(
    plan: Plan, runs: list[dict[str, Any]], hardware: Hardware
) -> dict[str, Any]:
    """What `bench.json` holds, but for the search of the largest batch.

    Args:
        plan: what was measured.
        runs: what the processes left, with `name` and `round`.
        hardware: that they ran on.
    """
    runs = [figures.complete(run) for run in runs]
    # Logical devices of a CPU share its cores.
    devices = 1 if hardware.kind == "cpu" else runs[0]["replicas"]
    record = {
        "schema": SCHEMA,
        "recipe": plan.recipe,
        "config": dict(plan.settings),
        "steps": plan.steps,
        "rounds": plan.rounds,
        "environment": environment.describe(),
        "devices": devices,
        "runs": runs,
        "summary": figures.summarize(runs),
        "ratios": figures.ratios(runs),
        "trained_precisions": {
            run["name"]: run["trained_precision"] for run in runs
        },
        "flops_per_step": runs[0]["flops_per_step"],
        "flops_reason": runs[0].get("flops_reason"),
        "dimension_multiple": runs[0].get("dimension_multiple"),
        "off_multiple": runs[0].get("off_multiple"),
        "published_peaks": {
            run["name"]: peaks.published_peak(
                hardware.device_names[0], run["precision"], run["tf32"] != "off"
            )
            for run in runs
        },
        "largest_batches": None,
        "memory_limit_bytes": plan.memory_limit_bytes,
    }
    record["shares"] = figures.shares_of_rates(record)
    record["callouts"] = callouts.find(record)
    record["decisions"] = callouts.decisions(record)
    record["verdicts"] = callouts.verdicts(record)
    return record
