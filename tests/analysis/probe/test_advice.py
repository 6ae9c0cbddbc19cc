"""The advice follows from the histograms by the rule that it states."""

import numpy as np
import pytest

from tfamp.analysis.probe import histogram
from tfamp.analysis.probe.advice import HEADROOM, ProbedTensor, advise


def tensor(kind, values, layer="dense", is_float32=False):
    name = "kernel" if kind == "gradient" else ""
    counted = histogram.of_array(np.asarray(values, np.float32))
    return ProbedTensor(layer, kind, name, counted, is_float32)


def powers(lowest, highest):
    return np.exp2(np.arange(lowest, highest + 1.0))


def test_the_scale_lifts_the_smallest_and_leaves_headroom_for_the_largest():
    advice = advise([tensor("gradient", powers(-28, -2))])
    assert advice.precision == "mixed_float16"
    # 2**-2 * 2**15 * 2**2 is 2**15, the last power of two that float16 holds.
    assert advice.scale == 2.0 ** (15 - HEADROOM + 2)
    assert "dense/kernel, gradient leaves no headroom" in advice.reason


def test_of_scales_that_lose_nothing_the_middle_one_is_taken():
    # 2**6 lifts the smallest to 2**-14; 2**24 is the highest looked at.
    advice = advise([tensor("gradient", powers(-20, -12))])
    assert advice.scale == 2.0**15
    assert "headroom" not in advice.reason


def test_an_arriving_gradient_limits_the_scale_as_well():
    advice = advise(
        [
            tensor("gradient", powers(-24, -12)),
            tensor("activation_gradient", powers(-8, 4)),
        ]
    )
    assert advice.scale == 2.0 ** (15 - HEADROOM - 4)


def test_layers_in_float32_already_limit_nothing():
    advice = advise(
        [
            tensor("gradient", powers(-20, -12)),
            tensor("gradient", powers(-60, 20), "head", is_float32=True),
            tensor("activation", [1e30], "head", is_float32=True),
        ]
    )
    assert (advice.precision, advice.scale) == ("mixed_float16", 2.0**15)
    assert advice.float32_layers == ()


@pytest.mark.parametrize(("output", "kept"), [(16376, ()), (16384, ("big",))])
def test_outputs_need_headroom_too(output, kept):
    advice = advise(
        [
            tensor("activation", [output, 1.0], "big"),
            tensor("gradient", powers(-20, -12)),
        ]
    )
    assert advice.float32_layers == kept


def test_what_takes_a_large_output_is_kept_in_float32_with_it():
    tensors = [
        tensor("activation", [1e6], "logits"),
        tensor("activation", [1.0], "weights"),
        tensor("activation", [1.0], "head", is_float32=True),
        tensor("activation", [1.0], "apart"),
        tensor("gradient", powers(-20, -12), "apart"),
    ]
    fed = {"logits": {"weights", "head"}, "weights": {"apart"}}
    advice = advise(tensors, fed)
    assert advice.float32_layers == ("logits", "weights")


def test_a_layer_kept_in_float32_does_not_limit_the_scale():
    tensors = [
        tensor("activation", [1e6], "big"),
        tensor("gradient", [2e4], "big"),
        tensor("gradient", powers(-20, -12)),
    ]
    assert advise(tensors).scale == 2.0**15
    assert advise(tensors[1:]).precision == "mixed_bfloat16"


def test_one_lossy_weight_gradient_goes_to_float32():
    # Among many, of which nothing is lost, its tenth weighs little.
    fine = [tensor("gradient", powers(-9, -6), f"layer_{i}") for i in range(9)]
    limiting = tensor("activation_gradient", [1.0], "head")
    lossy = tensor("gradient", powers(-50, -20), "lossy")
    advice = advise([*fine, limiting, lossy])
    assert advice.precision == "mixed_float16"
    assert advice.float32_layers == ("lossy",)


def test_where_no_scale_serves_bfloat16_does():
    wide = tensor("activation_gradient", powers(-60, 10))
    advice = advise([wide])
    assert (advice.precision, advice.scale) == ("mixed_bfloat16", 1.0)
    assert advice.float16_scale == 2.0**3
    assert "flushes" in advice.reason
    advice = advise([tensor("gradient", [2.0**14])])
    assert advice.precision == "mixed_bfloat16"
    assert advice.float16_scale is None
    assert "cannot hold dense/kernel, gradient at any scale" in advice.reason


def test_where_bfloat16_does_not_serve_either_float32_is_left():
    # The largest float32 rounds up to inf in bfloat16.
    advice = advise([tensor("gradient", [np.finfo(np.float32).max, 1.0])])
    assert advice.precision == "float32"
    assert "bfloat16 loses 50.0%" in advice.reason


def test_gradients_that_are_not_finite_in_float32_are_no_matter_of_precision():
    advice = advise([tensor("gradient", [np.nan, 1.0])])
    assert advice.precision == "float32"
    assert "not finite in float32 already" in advice.reason


def test_a_mask_of_minus_infinity_is_no_overflow():
    advice = advise(
        [
            tensor("activation", [-np.inf, 1.0]),
            tensor("gradient", powers(-20, -12)),
        ]
    )
    assert advice.precision == "mixed_float16"
    assert advice.float32_layers == ()


def test_a_model_without_gradients_in_16_bits_needs_no_scale():
    advice = advise([tensor("gradient", [1.0], is_float32=True)])
    assert advice.precision == "mixed_float16"
