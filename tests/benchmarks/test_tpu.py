"""Passes are compiled for a TPU, where its compiler is installed."""

import importlib.util

import keras
import pytest
import tensorflow as tf

import tfamp
from benchmarks import audits, compiled, tpu

has_compiler = all(map(importlib.util.find_spec, ("jax", "libtpu")))


def test_products_are_read_by_the_dtypes_of_what_they_take():
    text = """
    %a = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%c
    %b = f32[4,2]{1,0:T(8,128)S(1)} copy(%y)
    ROOT %p.1 = f32[8,2]{1,0:T(8,128)} convolution(%a, %b), op_name="a/dot"
    %q = f32[8,2]{1,0} convolution(bf16[8,4]{1,0} %a, bf16[8,4]{1,0} %a), a=b
    %s = (f32[2]{0}, token[]) infeed(token[] %e)
    %h = f32[2]{0} custom-call(%b), custom_call_target="xla_python_callback"
    """
    found = tpu.read(text)

    assert found["products"] == {"bf16 f32": 1, "bf16 bf16": 1}
    assert found["host"] == ("infeed", "xla_python_callback")
    assert found["wide"] == ("a/dot",)


@pytest.mark.skipif(not has_compiler, reason="needs pip install '.[audit]'")
def test_a_planted_float32_product_is_found_by_the_compiler_of_tpus(tmp_path):
    files = []
    for dtype in ("mixed_bfloat16", "float32"):
        tfamp.set_precision("mixed_bfloat16")
        model = keras.Sequential(
            [
                keras.Input((256,)),
                keras.layers.Dense(256, "relu", dtype=dtype),
                keras.layers.Dense(256, "softmax"),
            ]
        )
        model.compile("sgd", "sparse_categorical_crossentropy")
        batch = (tf.ones([128, 256]), tf.ones([128], tf.int32))
        passes = compiled.Passes(model, batch)
        files.append(tmp_path / f"{dtype}.hlo")
        files[-1].write_bytes(passes.hlo("hlo_serialized"))
    clean, planted = audits.for_tpu(files)

    assert clean["device"] == "TPU v5 lite"
    assert set(clean["products"]) == {"bf16 bf16"}
    assert clean["operations"] > 5 * 2 * 128 * 256 * 256
    assert clean["argument_bytes"] > 4 * 2 * 256 * 256
    assert audits.falls_short("mixed_bfloat16", {"tpu": clean}) == []
    assert audits.falls_short("mixed_bfloat16", {"tpu": planted}) == [
        "tpu: a float32 product"
    ]


@pytest.mark.skipif(has_compiler, reason="jax and libtpu are installed")
def test_without_the_compiler_one_line_says_so(tmp_path, capsys):
    (tmp_path / "a.hlo").write_bytes(b"")

    assert tpu.main(str(tmp_path / "a.hlo")) == 1
    assert "No module named" in capsys.readouterr().out
