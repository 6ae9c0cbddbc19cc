"""Operations in float32 while a layer is called, and only then.

Neither Keras nor TensorFlow asks anybody before an operation runs. So while at
least one kept layer is being called, in any thread, the public functions of
`keras.ops`' backend and of `tf`, and the operators of tensors, stand replaced
by ones that ask for the thread's region (`regions`). In other threads, and
outside of kept layers, they call what they replaced. The last one out puts all
back.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfamp import keras_internals, tensorflow_internals
from tfamp.precision import loops, regions, replaced
from tfamp.precision.regions import Region
from tfamp.scaling.optimizer import LossScaleOptimizer


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPERATORS = {
    "add": "add",
    "radd": "add",
    "sub": "subtract",
    "rsub": "subtract",
    "mul": "multiply",
    "rmul": "multiply",
    "truediv": "divide",
    "rtruediv": "divide",
    "div": "divide",
    "rdiv": "divide",
    "floordiv": "floor_divide",
    "rfloordiv": "floor_divide",
    "mod": "mod",
    "rmod": "mod",
    "pow": "power",
    "rpow": "power",
    "matmul": "matmul",
    "rmatmul": "matmul",
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "neg": "negative",
    "abs": "absolute",
    "getitem": "getitem",
}
# `tf` calls these otherwise than `keras.ops` does.
_SAME = {
    "pow": "power",
    "truediv": "divide",
    "realdiv": "divide",
    "div_no_nan": "divide_no_nan",
}
# They run functions of the caller.
_CONTROL = _names(
    "associative_scan case cond foldl foldr fori_loop map map_fn recompute_grad"
    " scan switch switch_case vectorized_map while_loop"
)
# They neither take nor return numbers, or run a program that is none of ours.
_ALONE = _names(
    "Variable assert_type autograph compute_output_spec convert_to_numpy"
    " custom_gradient control_dependencies device device_scope"
    " dynamic_partition enable_v2 function get_logger get_static_value"
    " grad_pass_through group histogram_fixed_width init_scope inside_function"
    " is_symbolic_tensor"
    " is_tensor load_library load_op_library name_scope no_gradient no_op"
    " numpy_function py_function print random_seed_dtype rank shape shape_n"
    " size stop_recording type_spec_from_value unstack_shape"
)

_TENSORFLOW = (
    tf,
    tf.math,
    tf.nn,
    tf.linalg,
    tf.debugging,
    tf.image,
    tf.signal,
    tf.sparse,
)

_lock = threading.Lock()
_calls = 0


@contextlib.contextmanager
def entered(region: Region) -> Iterator[None]:
    """Within it, this thread is in a region, and operations ask for it."""
    _count(1)
    try:
        with regions.within(region):
            yield
    finally:
        _count(-1)


def run(region: Region, function: Callable, args, kwargs):
    """Calls a layer's own function in its region; the dtypes are as ever."""
    with entered(region):
        return replaced.run(region, function, args, kwargs)


def _count(change: int) -> None:
    global _calls
    with _lock:
        before, _calls = _calls, _calls + change
        if before == 0:
            for owner, name, _, replacement in _replacements():
                setattr(owner, name, replacement)
        elif _calls == 0:
            for owner, name, original, replacement in _replacements():
                # Somebody else's replacement since then is not ours to undo;
                # ours, if they put it back, asks for a region and finds none.
                if vars(owner).get(name) is replacement:
                    setattr(owner, name, original)


@functools.cache
def _replacements() -> list[tuple]:
    found: list[tuple] = []
    for module in keras_internals.backend_modules():
        found.extend(_functions(module, module.__name__, by_keras=True))
    for module in _TENSORFLOW:
        found.extend(_functions(module, "tensorflow", by_keras=False))
    for owner, name in tensorflow_internals.storing_functions():
        function = vars(owner)[name]
        found.append((owner, name, function, replaced.stored(function)))
    owner, name = tensorflow_internals.TRACED_CALL
    function = vars(owner)[name]
    new = replaced.traced(function)
    found.append((owner, name, function, new))
    for short, name in _OPERATORS.items():
        special = f"__{short}__"
        if special in vars(tf.Tensor):
            function = vars(tf.Tensor)[special]
            new = replaced.operation(name, function, False, short[0] == "r")
            found.append((tf.Tensor, special, function, new))
    for owner, name in keras_internals.casts_of_users():
        function = vars(owner)[name]
        new = replaced.operation(name, function, True)
        found.append((owner, name, function, new))
    for owner, name in keras_internals.casts_of_keras():
        function = vars(owner)[name]
        new = replaced.cast_of_keras(name, function)
        found.append((owner, name, function, new))
    for owner, name in (
        *tensorflow_internals.gradient_functions(),
        # In a step: gradients and weights have dtypes of their own.
        *keras_internals.applying_functions(),
        (LossScaleOptimizer, "apply"),
    ):
        function = vars(owner)[name]
        found.append((owner, name, function, replaced.suspended(function)))
    call = vars(keras.layers.Layer)["__call__"]
    found.append(
        (keras.layers.Layer, "__call__", call, replaced.layer_call(call)),
    )
    return found


def _functions(module, home: str, by_keras: bool) -> Iterator[tuple]:
    # Copied in one step: other threads import while this one lists.
    for name, function in dict(vars(module)).items():
        if (
            name.startswith("_")
            or name in _ALONE
            or inspect.isclass(function)
            or not inspect.isfunction(function)
            or not function.__module__.startswith(home)
            or (inspect.isgeneratorfunction(function))
        ):
            continue
        # What another thread replaces for itself is not what it stands for.
        function = keras_internals.own_function(function)
        plain = name.removeprefix("reduce_")
        plain = _SAME.get(plain, plain)
        if name in _CONTROL:
            new = loops.control(function)
        else:
            new = replaced.operation(plain, function, by_keras)
        yield module, name, function, new
