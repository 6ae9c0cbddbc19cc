"""The tables of exported and loaded models."""

import numpy as np
import pytest

from benchmarks import exports


def loaded(output, same=True, skipped=0):
    return exports.Loaded(
        [np.float32([[4.0, output]])], same, (3, 5 - skipped), skipped, 0.5, 1
    )


def test_a_row_has_differences_by_the_largest_output_and_what_was_lost():
    row = exports.load_row(
        "gan",
        "mixed_float16",
        {
            "float32": loaded(1.0),
            "mixed_bfloat16": loaded(1.5),
            "mixed_float16": loaded(1.25, same=False, skipped=1),
        },
    )
    assert row == (
        "| gan | float16 | 1.2e-01 | 6.2e-02 | NO | 3 to 5, 3 to 5, 3 to 4 "
        "| 0, 0, 1 | 1 | 0.5, 0.5, 0.5 |"
    )


def test_one_bit_of_a_moment_is_a_difference():
    one = [np.float32([1.0]), np.int32(3)]
    assert exports.same_values(one, [np.float32([1.0]), np.int32(3)])
    off = np.nextafter(np.float32([1.0]), np.float32(2.0))
    assert not exports.same_values(one, [off, np.int32(3)])
    assert not exports.same_values(one, one[:1])


@pytest.mark.long
@pytest.mark.parametrize("name", ["gan", "lora"])
def test_a_recipe_s_model_is_exported_and_loaded(name, tmp_path):
    found, loads = exports.measure_one(
        exports.Config(), name, "mixed_bfloat16", tmp_path
    )
    assert all(isinstance(x, float) and x < 1e-5 for x in found)
    assert not isinstance(loads, str)
    assert all(each.same_weights for each in loads.values())
    assert loads["mixed_float16"].loss_scale > 1.0
    assert loads["mixed_bfloat16"].loss_scale == 1.0
