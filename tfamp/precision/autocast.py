"""Operations in float32 while a layer is called, and only then.

Neither Keras nor TensorFlow asks anybody before an operation runs. So while at
least one kept layer is being called, in any thread, the public functions of
`keras.ops`' backend and of `tf`, and the operators of tensors, stand replaced
by ones that ask a thread-local region. In other threads, and outside of kept
layers, they call what they replaced. The last one out puts all back.

Inside a region each tensor has the dtype that it has in memory, and the one
that the same code gives it without us. The second is remembered on tensors
that are float32 because of us ("meant" for 16 bits): a product takes them in
16 bits, and so does the end of the layer. What a program itself made float32
stays so. A layer thus returns the dtypes that it always returned.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.formats import FORMATS


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DTYPES_16 = ("bfloat16", "float16")
_MEANT = "_tfamp_meant"
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
_SAME = {"pow": "power", "truediv": "divide", "div_no_nan": "divide_no_nan"}
# They run functions of the caller, whose results must keep their dtypes from
# one round to the next and from one branch to the other.
_CONTROL = _names(
    "associative_scan case cond foldl foldr fori_loop map map_fn recompute_grad"
    " scan switch switch_case vectorized_map while_loop"
)
# They neither take nor return numbers, or run a program that is none of ours.
_ALONE = _names(
    "Variable autograph compute_output_spec convert_to_numpy custom_gradient"
    " control_dependencies device device_scope dynamic_partition enable_v2"
    " function get_logger get_static_value grad_pass_through group"
    " histogram_fixed_width init_scope inside_function is_symbolic_tensor"
    " is_tensor load_library load_op_library name_scope no_gradient no_op"
    " numpy_function py_function print random_seed_dtype rank shape shape_n"
    " size stop_recording type_spec_from_value unstack_shape"
)


@dataclasses.dataclass
class Seen:
    """What a call of a model showed.

    Attributes:
        operations: the names of those that float32 made a difference to, by
            the id of the innermost layer that they ran in.
        failed: the innermost layer that raised, or None.
    """

    operations: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    failed: keras.layers.Layer | None = None


@dataclasses.dataclass(frozen=True)
class Region:
    """A call of a kept layer, or of a layer inside it.

    Attributes:
        layer: the layer.
        dtype: its compute dtype, one of 16 bits; None where its operations
            are left alone, while those of layers inside it may not be.
        kinds: what operations compute in, as `operations.resolve` returns it;
            None to leave alone all, and only look on.
        seen: where to note what is seen.
    """

    layer: keras.layers.Layer
    dtype: str | None
    kinds: Mapping[str, str] | None
    seen: Seen | None = None

    def note(self, name: str) -> None:
        if self.seen is not None:
            names = self.seen.operations.setdefault(id(self.layer), set())
            names.add(name)


class _State(threading.local):
    region: Region | None = None


_state = _State()
_lock = threading.Lock()
_calls = 0


def current() -> Region | None:
    """The region that this thread is in."""
    return _state.region


def _active() -> Region | None:
    region = _state.region
    return None if region is None or region.dtype is None else region


@contextlib.contextmanager
def entered(region: Region | None) -> Iterator[None]:
    """Within it, this thread is in a region; None suspends the one it is in."""
    former = _state.region
    if region is None:
        _state.region = None
        try:
            yield
        finally:
            _state.region = former
        return
    _count(1)
    _state.region = region
    try:
        yield
    finally:
        _state.region = former
        _count(-1)


def run(region: Region, function: Callable, args, kwargs):
    """Calls a layer's own function in its region; the dtypes are as ever."""
    with entered(region):
        return as_meant(function(*args, **kwargs))


def as_meant(structure):
    """Takes what is float32 because of us to the 16 bits that it stands for."""
    with entered(None):
        return _mapped(structure, _meant_value)


def meant(tensor, dtype: str):
    """The same numbers, to be taken in 16 bits by a product."""
    with entered(None):
        tensor = tf.identity(tf.cast(tensor, tf.float32))
    setattr(tensor, _MEANT, dtype)
    return tensor


def is_meant(tensor) -> bool:
    """Whether a product takes it in 16 bits."""
    return hasattr(tensor, _MEANT)


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
    for module in (tf, tf.math, tf.nn, tf.linalg):
        found.extend(_functions(module, "tensorflow", by_keras=False))
    for short, name in _OPERATORS.items():
        special = f"__{short}__"
        if special in vars(tf.Tensor):
            function = vars(tf.Tensor)[special]
            new = _replacement(name, function, False, short[0] == "r")
            found.append((tf.Tensor, special, function, new))
    for owner, name in keras_internals.casts_of_users():
        function = vars(owner)[name]
        new = _replacement(name, function, True, False)
        found.append((owner, name, function, new))
    for owner, name in (
        *keras_internals.casts_of_keras(),
        *keras_internals.gradient_functions(),
    ):
        function = vars(owner)[name]
        found.append((owner, name, function, _suspended(function)))
    call = vars(keras.layers.Layer)["__call__"]
    found.append(
        (keras.layers.Layer, "__call__", call, _layer_call(call)),
    )
    return found


def _functions(module, home: str, by_keras: bool) -> Iterator[tuple]:
    for name, function in list(vars(module).items()):
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
            new = _control(function)
        else:
            new = _replacement(plain, function, by_keras, False)
        yield module, name, function, new


def _replacement(
    name: str, function: Callable, by_keras: bool, is_reflected: bool
) -> Callable:
    dtype_position = _dtype_position(function)

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        region = _active()
        if region is None:
            return function(*args, **kwargs)
        _state.region = None
        try:
            row = name
            if name == "multiply" and len(args) > 1 and args[0] is args[1]:
                row = "square"
            kind = _kind(region, row, args, kwargs, is_reflected)
            if kind == "made":
                return _make(
                    region, function, args, kwargs, dtype_position, by_keras
                )
            return _compute(region, row, kind, function, args, kwargs, by_keras)
        finally:
            _state.region = region

    return replacement


def _dtype_position(function: Callable) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:
        return None
    return names.index("dtype") if "dtype" in names else None


def _kind(region: Region, name: str, args, kwargs, is_reflected) -> str | None:
    if region.kinds is None or region.dtype is None:
        return None
    kind = region.kinds.get(name)
    if name in ("divide", "true_divide") and kind == "float32":
        operands = [*args, *kwargs.values()]
        if len(operands) > 1 and not is_reflected:
            divisor = operands[1]
            if isinstance(divisor, (int, float)) and _is_held(
                divisor, region.dtype
            ):
                return None
    return kind


def _is_held(number: float, dtype: str) -> bool:
    return FORMATS[dtype].min_normal <= abs(number) <= FORMATS[dtype].max


def _compute(region, name, kind, function, args, kwargs, by_keras):
    dtypes = _meant_dtypes((args, kwargs), by_keras)
    is_meant = bool(dtypes) and dtypes <= {region.dtype}
    has_float32 = _has_float32((args, kwargs))
    if kind == "product" and is_meant:
        if has_float32:
            args, kwargs = as_meant((args, kwargs))
    elif kind == "float32" or (has_float32 and dtypes & set(_DTYPES_16)):
        if kind == "float32" and (is_meant or _has_16_bits((args, kwargs))):
            region.note(name)
        args, kwargs = _mapped((args, kwargs), _float32_value)
        kwargs = _asked_in_float32(kwargs)
    result = function(*args, **kwargs)
    if is_meant:
        _mark(result, region.dtype)
    return result


def _make(region, function, args, kwargs, position, by_keras):
    """A cast, or numbers from nothing, in float32 where 16 bits are wanted."""
    wanted, is_positional = kwargs.get("dtype"), False
    if wanted is None and position is not None and len(args) > position:
        wanted, is_positional = args[position], True
    name = _dtype_name(wanted)
    source = args[0] if args else next(iter(kwargs.values()), None)
    if name in _DTYPES_16:
        if _dtype_name(getattr(source, "dtype", None)) == name:
            return function(*args, **kwargs)
        if getattr(source, _MEANT, None) == name:
            return source
        if is_positional:
            args = (*args[:position], "float32", *args[position + 1 :])
        else:
            kwargs = {**kwargs, "dtype": "float32"}
        result = function(*args, **kwargs)
        return meant(result, name) if tf.is_tensor(result) else result
    result = function(*args, **kwargs)
    if not tf.is_tensor(result) or wanted is None:
        return result
    if result is source:
        result = tf.identity(result)
    # `cast(mask, scores.dtype)` means the dtype of the scores, 16 bits, and
    # `cast(x, "float32")` means float32.
    if by_keras and isinstance(wanted, tf.DType) and name == "float32":
        setattr(result, _MEANT, region.dtype)
    return result


def _asked_in_float32(kwargs: dict) -> dict:
    if _dtype_name(kwargs.get("dtype")) in _DTYPES_16:
        return {**kwargs, "dtype": "float32"}
    return kwargs


def _control(function: Callable) -> Callable:
    @functools.wraps(function)
    def replacement(*args, **kwargs):
        region = _active()
        if region is None:
            return function(*args, **kwargs)

        def inside(value):
            if not inspect.isroutine(value) and not isinstance(
                value, functools.partial
            ):
                return _meant_value(value)
            return functools.partial(_run_inside, region, value)

        with entered(None):
            args, kwargs = _mapped((args, kwargs), inside)
            return function(*args, **kwargs)

    return replacement


def _run_inside(region, function, *args, **kwargs):
    return run(region, function, args, kwargs)


def _suspended(function: Callable) -> Callable:
    @functools.wraps(function)
    def replacement(*args, **kwargs):
        if _active() is None:
            return function(*args, **kwargs)
        if function.__name__ in keras_internals.CUSTOM_GRADIENT_CALLS:
            # The gradient was written for operands of one dtype.
            args, kwargs = as_meant((args, kwargs))
        with entered(None):
            return function(*args, **kwargs)

    return replacement


def _layer_call(function: Callable) -> Callable:
    """A layer inside a kept one: its results have their dtypes at its end."""

    @functools.wraps(function)
    def replacement(self, *args, **kwargs):
        region = _state.region
        if region is None:
            return function(self, *args, **kwargs)
        is_left = (
            region.kinds is None
            or self.compute_dtype not in _DTYPES_16
            or self.quantization_mode is not None
            or getattr(self, "_tfamp_is_left", False)
        )
        dtype = None if is_left else self.compute_dtype
        inner = dataclasses.replace(region, layer=self, dtype=dtype)
        with entered(inner):
            try:
                return as_meant(function(self, *args, **kwargs))
            except Exception:
                seen = region.seen
                if seen is not None and seen.failed is None:
                    seen.failed = self
                raise

    return replacement


def _mark(structure, dtype: str) -> None:
    for leaf in _flat(structure):
        if tf.is_tensor(leaf) and _dtype_name(leaf.dtype) == "float32":
            with contextlib.suppress(AttributeError):
                setattr(leaf, _MEANT, dtype)


def _meant_dtypes(structure, by_keras: bool) -> set[str]:
    """The dtypes that the floats among the arguments stand for."""
    found = set()
    for leaf in _flat(structure):
        if isinstance(leaf, np.ndarray) and not by_keras:
            # TensorFlow converts it to the dtype of the other operand.
            continue
        name = getattr(leaf, _MEANT, None)
        if name is None and hasattr(leaf, "dtype"):
            name = _dtype_name(leaf.dtype)
        if name is not None and ("float" in name or "complex" in name):
            found.add(name)
    return found


def _has_float32(structure) -> bool:
    return any(
        tf.is_tensor(leaf) and _dtype_name(leaf.dtype) == "float32"
        for leaf in _flat(structure)
    )


def _has_16_bits(structure) -> bool:
    return any(
        hasattr(leaf, "dtype") and _dtype_name(leaf.dtype) in _DTYPES_16
        for leaf in _flat(structure)
    )


def _float32_value(value):
    if isinstance(value, keras.Variable):
        if keras.backend.is_float_dtype(value.dtype):
            return tf.cast(keras_internals.uncast_value(value), tf.float32)
        return value
    if tf.is_tensor(value) and _dtype_name(value.dtype) in _DTYPES_16:
        return tf.cast(value, tf.float32)
    return value


def _meant_value(value):
    name = getattr(value, _MEANT, None)
    if name is not None and tf.is_tensor(value):
        return tf.cast(value, name)
    return value


def _dtype_name(dtype) -> str | None:
    if dtype is None:
        return None
    try:
        return tf.as_dtype(dtype).base_dtype.name
    except (TypeError, ValueError):
        return None


def _flat(structure) -> list:
    return keras.tree.flatten(structure)


def _mapped(structure, function: Callable):
    return keras.tree.map_structure(function, structure)
