"""Operations in float32 beside those of `torch.autocast`."""

import keras
import pytest

from benchmarks import autocast

pytestmark = pytest.mark.filterwarnings("ignore")


def test_there_are_ten_networks_with_a_reason_for_each_difference():
    assert len({network.name for network in autocast.NETWORKS}) == 10
    assert all(autocast.REASONS.values())


def test_a_network_in_keras_is_read_with_its_sensitive_operations_in_float32():
    network = next(n for n in autocast.NETWORKS if n.name == "RMS norm")
    keras.config.set_dtype_policy("float32")
    found = autocast.in_keras(network, "bfloat16")
    assert found["product"] == {"bfloat16"}
    assert found["power"] == found["mean"] == found["rsqrt"] == {"float32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_autocast_has_in_float32_tfamp_has_too(dtype):
    pytest.importorskip("torch", reason="needs the extra torch")
    rows = autocast.compare(dtype)
    assert {row.network for row in rows} == {n.name for n in autocast.NETWORKS}
    for row in rows:
        if row.torch == ("float32",):
            assert row.tfamp == ("float32",), row
        if row.operation == "product":
            assert row.tfamp == row.torch == (dtype,), row
        # Where they differ, the reason is known.
        assert row.tfamp == row.torch or row.reason, row
