"""Products of 16-bit steps are in 16 bits, and what is not is found."""

import keras
import pytest
import tensorflow as tf

import tfamp
from benchmarks import compiled


def found_in(inner, precision="mixed_bfloat16"):
    tfamp.set_precision(precision)
    model = keras.Sequential(
        [keras.Input((8,)), inner(), keras.layers.Dense(2)]
    )
    model.compile("sgd", "mse")
    batch = (tf.ones([4, 8]), tf.ones([4, 2]))
    passes = compiled.Passes(model, batch)
    found = compiled.read(passes.hlo())
    return found, compiled.beyond_heads(found.wide, passes.heads)


def test_a_planted_float32_product_is_found():
    clean, others = found_in(lambda: keras.layers.Dense(8, name="inner"))
    planted, named = found_in(
        lambda: keras.layers.Dense(8, dtype="float32", name="inner")
    )

    # Of the output layer, which is kept in float32: forward, and the gradients
    # of its kernel and its input. The other needs none of its input.
    assert clean.products == {"f32 f32": 3, "bf16 bf16": 2}
    assert planted.products == {"f32 f32": 5}
    assert len(planted.wide) == 5
    # What is of the output layer is so by decision.
    assert others == []
    assert len(named) == 2
    assert all("inner" in name for name in named)
    assert clean.host == planted.host == ()


def test_calls_of_the_host_and_conversions_are_read():
    text = """
    ROOT %a.1 = bf16[4,8]{1,0} convert(f32[4,8]{1,0} %b)
    %c = f32[2]{0} custom-call(%b), custom_call_target="xla_python_callback"
    %d = (f32[2]{0}, token[]) infeed(token[] %e)
    %f = f32[4,4]{1,0} dot(f32[4,8]{1,0} %a, f32[8,4]{1,0} %g), lhs_c={1}
    """
    found = compiled.read(text)

    assert found.operations == 4
    assert found.converts == 1
    assert found.host == ("xla_python_callback", "infeed")
    assert found.products == {"f32 f32": 1}


@pytest.mark.long
@pytest.mark.parametrize("precision", compiled.PRECISIONS)
@pytest.mark.parametrize("name", compiled.RECIPES)
def test_a_recipe_s_products_are_in_its_precision(name, precision):
    passes = compiled.passes_of(name, precision)
    found = compiled.read(passes.hlo())

    assert found.products
    assert found.host == ()
    # Few beside the operations, though each layer casts what it takes.
    assert found.converts < 0.3 * found.operations
    if precision != "float32":
        assert compiled.beyond_heads(found.wide, passes.heads) == []
