"""Sentences on what a benchmark shows, and on what it only seems to show.

Each callout has a measured figure and a limit. They are judgements of whether
a ratio says something about 16 bits, not about the model.
"""

import math
from collections.abc import Mapping
from typing import Any

from tfamp.analysis.bench.figures import BASE

# Below this share of a step, products cannot matter much to it.
LEAST_PRODUCT_SHARE = 0.25
# A share of the step that no precision shortens, and that shows in a ratio.
MOST_INPUT_SHARE = 0.10
# Share of the operations in products that matrix units take with padding.
MOST_OFF_MULTIPLE = 0.10
# Faster products, to call a device one with 16-bit units.
LEAST_PRODUCT_SPEEDUP = 1.1
# A skipped step saves the update.
MOST_SKIPPED_SHARE = 0.05
# Of fewer rounds, all fall on one side by chance more often than one in four.
LEAST_ROUNDS = 3
# Rounds that all lie so near to 1 show that there is no difference to speak of.
SAME = 0.03
# More steps in a round than this many times as many are no advice.
_MOST_STEPS = 16

Record = Mapping[str, Any]


def find(record: Record) -> list[dict[str, Any]]:
    """The callouts of a benchmark.

    Args:
        record: with `summary`, `ratios`, `shares`, `off_multiple`,
            `dimension_multiple`, `trained_precisions`.

    Returns:
        Each with `rule`, `name` (of the series, or None for all of them),
        `measured`, `limit` and `message`.
    """
    found = [_too_small(record), _off_units(record)]
    for name in record["summary"]:
        found += [
            _input_bound(record, name),
            _skips(record, name),
            _other_precision(record, name),
        ]
    for name in record["ratios"]:
        found += [_no_16_bit_units(record, name), _noise(record, name)]
    return [callout for callout in found if callout]


def is_claimed(ratio: Mapping[str, Any]) -> bool:
    """Whether all rounds agree on which one is faster, and are enough."""
    one_side = ratio["highest"] < 1 or ratio["lowest"] > 1
    return one_side and len(ratio["rounds"]) >= LEAST_ROUNDS


def decision(ratio: Mapping[str, Any]) -> str:
    """What the rounds show: "faster", "slower", "same" or "undecided"."""
    if is_claimed(ratio):
        return "faster" if ratio["median"] < 1 else "slower"
    farthest = max(ratio["highest"] - 1, 1 - ratio["lowest"])
    enough = len(ratio["rounds"]) >= LEAST_ROUNDS
    return "same" if enough and farthest <= SAME else "undecided"


def decisions(record: Record) -> dict[str, str]:
    """The decision on each series but float32."""
    return {
        name: decision(ratio["time"])
        for name, ratio in record["ratios"].items()
    }


def verdicts(record: Record) -> dict[str, str]:
    """A sentence on each series but float32."""
    return {
        name: _verdict(display_name(name), ratio, record["steps"])
        for name, ratio in record["ratios"].items()
    }


def display_name(name: str) -> str:
    """A series' name for readers."""
    return name.replace("_tf32_off", " without TF32")


def _verdict(name, ratios, steps):
    time = ratios["time"]
    rounds = len(time["rounds"])
    spread = f"{time['lowest']:.2f} to {time['highest']:.2f}, {_rounds(rounds)}"
    memory = _memory_sentence(ratios)
    takes = f"a step takes {time['median']:.2f} of float32's time ({spread})"
    match decision(time):
        case "same":
            return (
                f"{name} is as fast as float32, within {SAME:.0%} in every "
                f"round: {takes}.{memory}"
            )
        case "undecided":
            return (
                f"{name}: undecided, {takes}. {_what_would_tell(time, steps)}"
                f"{memory}"
            )
    speed = 1 / time["median"]
    how = "faster" if speed > 1 else "slower"
    return (
        f"{name} is {how}: {speed:.2f} times the speed of float32; a step "
        f"takes {time['median']:.2f} of its time ({spread}).{memory}"
    )


def _what_would_tell(time, steps):
    if len(time["rounds"]) < LEAST_ROUNDS:
        return f"--rounds={LEAST_ROUNDS} can tell; the default, 5, is better."
    # The spread of a round falls with the square root of its steps.
    width = time["highest"] - time["lowest"]
    effect = max(abs(1 - time["median"]), SAME)
    times = min(max(2, math.ceil((width / effect) ** 2)), _MOST_STEPS)
    return (
        f"Run it again with --steps={times * steps}, which makes each round "
        "steadier, and on a machine that does nothing else."
    )


def _memory_sentence(ratios):
    # Of a process on a CPU, most was there before: TensorFlow itself.
    growth, peak = ratios["memory_growth"], ratios["memory"]
    if growth is not None:
        return (
            f" Training adds {growth['median']:.2f} of the memory that it "
            "adds in float32."
        )
    if peak is not None:
        return f" Its peak memory is {peak['median']:.2f} of float32's."
    return ""


def _too_small(record):
    share = record["shares"][BASE]["product_share"]
    if share is None or share >= LEAST_PRODUCT_SHARE:
        return None
    return _callout(
        "too_small",
        None,
        share,
        LEAST_PRODUCT_SHARE,
        "Too small a model, or too small a batch, to judge 16 bits by: at the "
        "rate at which this device multiplies large float32 matrices, the "
        f"products of a step would take {share:.0%} of its time (limit "
        f"{LEAST_PRODUCT_SHARE:.0%}). The rest is starting operations and "
        "moving data, and a ratio to float32 mostly compares that.",
    )


def _off_units(record):
    share, multiple = record["off_multiple"], record["dimension_multiple"]
    if not share or share <= MOST_OFF_MULTIPLE:
        return None
    return _callout(
        "off_units",
        None,
        share,
        MOST_OFF_MULTIPLE,
        f"{share:.0%} of the operations are in products with a width that is "
        f"no multiple of {multiple} (limit {MOST_OFF_MULTIPLE:.0%}), which "
        "16-bit matrix units take with padding or not at all: `tfamp lint` "
        "names the layers.",
    )


def _input_bound(record, name):
    shares = record["summary"][name]["input_share"]
    share = shares["median"]
    # Where one round has none of it, it is noise.
    if share <= MOST_INPUT_SHARE or shares["lowest"] <= 0:
        return None
    return _callout(
        "input_bound",
        name,
        share,
        MOST_INPUT_SHARE,
        f"{display_name(name)} waits for its input: with batches held in "
        f"memory a step takes {share:.0%} less (limit {MOST_INPUT_SHARE:.0%})."
        " No precision speeds that part up.",
    )


def _no_16_bit_units(record, name):
    rates = {
        each: record["summary"][each]["product_rate"]["highest"]
        for each in (BASE, name)
    }
    speedup = rates[name] / rates[BASE]
    if not name.startswith("mixed_") or speedup >= LEAST_PRODUCT_SPEEDUP:
        return None
    dtype = name.removeprefix("mixed_")
    return _callout(
        "no_16_bit_units",
        name,
        speedup,
        LEAST_PRODUCT_SPEEDUP,
        f"No units for {dtype} here: large products in {dtype} run at "
        f"{speedup:.2g} times the rate of float32 (limit "
        f"{LEAST_PRODUCT_SPEEDUP}). What {name} costs on this device says "
        "nothing about one that has them.",
    )


def _noise(record, name):
    ratio = record["ratios"][name]["time"]
    if decision(ratio) != "undecided":
        return None
    rounds = len(ratio["rounds"])
    if rounds < LEAST_ROUNDS:
        return _callout(
            "few_rounds",
            name,
            rounds,
            LEAST_ROUNDS,
            f"{_rounds(rounds)} of {display_name(name)} cannot show a spread "
            f"(at least {LEAST_ROUNDS} do): nothing is claimed.",
        )
    return _callout(
        "noise",
        name,
        ratio["highest"] - ratio["lowest"],
        abs(1 - ratio["median"]),
        f"The spread of {display_name(name)} is larger than its effect: a "
        f"step takes {ratio['lowest']:.2f} to {ratio['highest']:.2f} of "
        f"float32's time, with 1 in between, over {_rounds(rounds)}: nothing "
        "is claimed.",
    )


def _skips(record, name):
    share = record["summary"][name]["skipped_share"]["median"]
    if share <= MOST_SKIPPED_SHARE:
        return None
    return _callout(
        "skips",
        name,
        share,
        MOST_SKIPPED_SHARE,
        f"{display_name(name)} skipped {share:.0%} of the timed steps (limit "
        f"{MOST_SKIPPED_SHARE:.0%}), and a skipped step has no update.",
    )


def _other_precision(record, name):
    trained = record["trained_precisions"][name]
    wanted = name.removesuffix("_tf32_off")
    if trained == wanted:
        return None
    return _callout(
        "other_precision",
        name,
        None,
        None,
        f"Asked for {wanted}, the recipe trained in {trained}: it does not "
        "follow its field `precision`.",
    )


def _callout(rule, name, measured, limit, message):
    return {
        "rule": rule,
        "name": name,
        "measured": measured,
        "limit": limit,
        "message": message,
    }


def _rounds(count):
    return "1 round" if count == 1 else f"{count} rounds"
