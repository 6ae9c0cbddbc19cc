"""Medians, ratios and callouts, on figures that were made up."""

import pytest

from tfamp.analysis.bench import callouts, peaks
from tfamp.analysis.bench import figures as bench_figures
from tfamp.analysis.bench.largest import LargestBatch, search


def run(name, number, milliseconds, **figures):
    """A run as its process leaves it."""
    defaults = {
        "name": name,
        "round": number,
        "precision": name.removesuffix("_tf32_off"),
        "trained_precision": name.removesuffix("_tf32_off"),
        "tf32": None,
        "replicas": 1,
        "batch_size": 8,
        "step_milliseconds": milliseconds,
        "in_memory_step_milliseconds": milliseconds,
        "input_share": 0.0,
        "examples_per_second": 8000 / milliseconds,
        "compile_seconds": 1.0,
        "skipped_steps": 0,
        "timed_steps": 20,
        "peak_memory_bytes": 1000,
        "resident_bytes_before": 600,
        "product_rate": 1e12 if name == "float32" else 2e12,
    }
    return bench_figures.complete({**defaults, **figures})


def record_of(base=(4.0, 4.0, 4.0), other=(2.0, 2.0, 2.0), **changes):
    """A record of float32 against mixed_bfloat16; `other_FIGURE=` sets one."""
    figures = {
        name.removeprefix("other_"): value
        for name, value in changes.items()
        if name.startswith("other_")
    }
    runs = [run("float32", i, ms) for i, ms in enumerate(base)]
    runs += [
        run("mixed_bfloat16", i, ms, **figures) for i, ms in enumerate(other)
    ]
    record = {
        "summary": bench_figures.summarize(runs),
        "ratios": bench_figures.ratios(runs),
        "trained_precisions": {
            each["name"]: each["trained_precision"] for each in runs
        },
        # Half of a float32 step of 4 ms at the rate of large products.
        "flops_per_step": 2e9,
        "devices": 1,
        "published_peaks": {"float32": None, "mixed_bfloat16": 4e12},
        "dimension_multiple": 8,
        "off_multiple": 0.0,
        "steps": 20,
    }
    others = {n: v for n, v in changes.items() if not n.startswith("other_")}
    record |= others
    record["shares"] = bench_figures.shares_of_rates(record)
    return record


def rules(record):
    return [callout["rule"] for callout in callouts.find(record)]


def test_a_spread_is_median_quartiles_and_extremes():
    assert bench_figures.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "low_quartile": 2.0,
        "high_quartile": 4.0,
        "lowest": 1.0,
        "highest": 5.0,
    }
    assert set(bench_figures.spread([7.0]).values()) == {7.0}


def test_a_ratio_compares_runs_of_one_round():
    # The machine is twice as slow in round 1; medians would say 0.75.
    found = record_of((4.0, 8.0, 4.0), (2.0, 4.0, 3.0))["ratios"]
    time = found["mixed_bfloat16"]["time"]
    assert time["rounds"] == [0.5, 0.5, 0.75]
    assert (time["median"], time["highest"]) == (0.5, 0.75)


def test_memory_is_compared_whole_and_by_what_training_adds():
    ratios = record_of(other_peak_memory_bytes=800)["ratios"]["mixed_bfloat16"]
    assert ratios["memory"]["median"] == 0.8
    assert ratios["memory_growth"]["median"] == 0.5


def test_memory_that_a_device_does_not_tell_has_no_ratio():
    ratios = record_of(
        other_peak_memory_bytes=None, other_resident_bytes_before=None
    )["ratios"]["mixed_bfloat16"]
    assert ratios["memory"] is ratios["memory_growth"] is None


def test_shares_of_rates_are_of_a_steps_time_and_of_all_devices():
    shares = record_of()["shares"]
    assert shares["float32"] == {"product_share": 0.5, "peak_share": None}
    assert shares["mixed_bfloat16"]["peak_share"] == 0.25
    assert record_of(devices=2)["shares"]["float32"]["product_share"] == 0.25


def test_a_clear_result_is_claimed_without_a_callout():
    record = record_of()
    assert rules(record) == []
    assert callouts.verdicts(record)["mixed_bfloat16"] == (
        "mixed_bfloat16 is faster: 2.00 times the speed of float32; a step "
        "takes 0.50 of its time (0.50 to 0.50, 3 rounds). Training adds 1.00 "
        "of the memory that it adds in float32."
    )


@pytest.mark.parametrize(
    ("changes", "rule", "measured"),
    [
        ({"flops_per_step": 0.96e9}, "too_small", 0.24),
        ({"off_multiple": 0.11}, "off_units", 0.11),
        ({"other_input_share": 0.11}, "input_bound", 0.11),
        ({"other_product_rate": 1.05e12}, "no_16_bit_units", 1.05),
        ({"other_skipped_steps": 2}, "skips", 0.1),
        ({"other_trained_precision": "float32"}, "other_precision", None),
        ({"base": (4.0,), "other": (2.0,)}, "few_rounds", 1),
        ({"other": (2.0, 2.0, 4.1)}, "noise", 4.1 / 4 - 0.5),
    ],
)
def test_what_only_seems_a_speed_up_is_called_out(changes, rule, measured):
    (callout,) = callouts.find(record_of(**changes))
    assert callout["rule"] == rule
    assert callout["measured"] == pytest.approx(measured)


@pytest.mark.parametrize(
    "changes",
    [
        {"flops_per_step": 1.04e9},
        {"flops_per_step": None},
        {"off_multiple": 0.09},
        {"off_multiple": None},
        {"other_input_share": 0.09},
        {"other_product_rate": 1.15e12},
        {"other_skipped_steps": 1},
        {"other": (2.0, 2.0, 3.9)},
    ],
)
def test_what_stays_within_a_limit_is_not(changes):
    assert rules(record_of(**changes)) == []


def test_waiting_that_one_round_does_not_have_is_noise():
    record = record_of(other_input_share=0.2)
    shares = record["summary"]["mixed_bfloat16"]["input_share"]
    assert rules(record) == ["input_bound"]
    shares["lowest"] = -0.1
    assert rules(record) == []


def test_nothing_is_claimed_where_the_spread_is_larger_than_the_effect():
    record = record_of(other=(3.8, 3.9, 4.1))
    assert rules(record) == ["noise"]
    verdict = callouts.verdicts(record)["mixed_bfloat16"]
    assert verdict.startswith("mixed_bfloat16: undecided, a step takes 0.97")
    # (0.075 of spread / 0.03)^2 is 7 times the steps.
    assert "--steps=140" in verdict


@pytest.mark.parametrize(
    ("other", "decision", "words"),
    [
        ((2.0, 2.0, 2.0), "faster", "is faster: 2.00 times"),
        ((8.0, 8.0, 8.0), "slower", "is slower: 0.50 times"),
        ((3.9, 4.0, 4.1), "same", "is as fast as float32, within 3%"),
        ((3.8, 4.0, 4.1), "undecided", "--steps=140"),
        ((2.0, 2.0, 5.0), "undecided", "--steps=60"),
    ],
)
def test_rounds_decide_or_say_what_would(other, decision, words):
    record = record_of(other=other)
    assert callouts.decisions(record) == {"mixed_bfloat16": decision}
    assert words in callouts.verdicts(record)["mixed_bfloat16"]
    assert ("noise" in rules(record)) is (decision == "undecided")


def test_too_few_rounds_name_how_many_can_tell():
    record = record_of(base=(4.0,), other=(2.0,))
    assert callouts.decisions(record) == {"mixed_bfloat16": "undecided"}
    assert (
        "--rounds=3 can tell" in (callouts.verdicts(record)["mixed_bfloat16"])
    )


def test_slower_is_said_too():
    verdict = callouts.verdicts(record_of(other=(8.0, 8.0, 8.0)))
    assert "is slower: 0.50 times" in verdict["mixed_bfloat16"]


def test_float32_without_tf32_is_no_16_bit_precision():
    runs = [run("float32", i, 2.0) for i in range(3)]
    runs += [
        run("float32_tf32_off", i, 4.0, product_rate=1e12) for i in range(3)
    ]
    record = record_of()
    record["summary"] = bench_figures.summarize(runs)
    record["ratios"] = bench_figures.ratios(runs)
    record["trained_precisions"] = dict.fromkeys(record["summary"], "float32")
    assert rules(record) == []
    assert callouts.verdicts(record)["float32_tf32_off"].startswith(
        "float32 without TF32 is slower: 0.50 times"
    )


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "tera"),
    [
        ("Tesla V100-SXM2-16GB", "mixed_float16", True, 125),
        ("Tesla V100-SXM2-16GB", "float32", True, 15.7),
        ("Tesla V100-SXM2-16GB", "mixed_bfloat16", True, None),
        ("NVIDIA A100-SXM4-40GB", "float32", True, 156),
        ("NVIDIA A100-SXM4-40GB", "float32", False, 19.5),
        ("NVIDIA H100 80GB HBM3", "mixed_bfloat16", True, 989.5),
        ("NVIDIA H100 PCIe", "mixed_bfloat16", True, 756),
        ("NVIDIA L40S", "mixed_bfloat16", True, None),
        ("TPU v5e", "mixed_bfloat16", True, 197),
        ("TPU v5p", "mixed_bfloat16", True, 459),
        ("TPU", "mixed_bfloat16", True, None),
        ("Intel(R) Xeon(R)", "float32", True, None),
    ],
)
def test_a_published_peak_is_that_of_the_device(device, precision, tf32, tera):
    found = peaks.published_peak(device, precision, tf32)
    assert found == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize(
    ("limit", "start", "multiple"),
    [(1000, 64, 1), (63, 64, 1), (64, 64, 1), (5, 64, 1), (5, 10, 2)],
)
def test_the_largest_batch_is_found_to_a_sixteenth(limit, start, multiple):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= limit

    found = search(fits, start, multiple)
    assert found.rows <= limit < found.fails
    assert found.fails - found.rows <= max(multiple, found.rows / 16)
    assert not [rows for rows in tried if rows % multiple]
    assert len(tried) == len(set(tried)) <= 14


def test_where_no_batch_fits_the_search_ends():
    assert search(lambda rows: False, 8, 2) == LargestBatch(0, 2)


def test_where_every_batch_fits_the_search_ends():
    found = search(lambda rows: True, 48)
    assert found.fails is None
    assert found.rows >= 2**20
