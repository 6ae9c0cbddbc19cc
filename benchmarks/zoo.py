"""What `keep_float32` leaves in 16 bits in models of a module of yours.

    python -m benchmarks.zoo --models=zoo.py --output=zoo.md

The module's `ZOO` maps names to functions that take nothing and return a
model, its loss and a batch, `(x, y)` or `(x, y, sample_weight)`. Where the
model compiles itself, a function `compile_it(model, make_optimizer, options)`
stands for the loss, and the step that is looked at is its `train_step`. The
model and its losses should be small, and their data made of NumPy arrays.

Each model is built in each precision, in a process of its own; its training
step is traced as `tfamp.fit` traces it, before and after `keep_float32`, and
sensitive operations of 16 bits and products are counted. Prints a Markdown
row a model: plain sums of gradients stand apart, as `fit` leaves those in 16
bits whose kernel, tried with a known sum, adds in float32. Not counted are
quotients by a constant that 16 bits hold, which are products, and what nothing
comes of, which the runtime leaves out. "Error" is the
relative distance of the output from float32 with the same weights, in
inference. A model that fails, or takes too long, is told as such; where
`keep_float32` refuses the outputs, `outputs=False` is looked at.
"""

import collections
import dataclasses
import importlib.util
import inspect
import json
import multiprocessing
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.program import run
from tfamp.accumulation.trace import summing_in_float32
from tfamp.errors import InputError
from tfamp.formats import FORMATS
from tfamp.precision import heads
from tfamp.precision.before import restate_constants
from tfamp.precision.keep_float32 import Float32Layer, keep_float32
from tfamp.precision.layer_paths import walk
from tfamp.recipe.flags import check_ranges, flag

PRODUCTS = re.compile(
    r"(Batch|Sparse|)MatMul(V[23])?$|Einsum$|Conv[23]D|DepthwiseConv2dNative"
)
SENSITIVE = frozenset(
    (
        *("Softmax", "LogSoftmax", "Softplus", "Exp", "Expm1", "Log", "Log1p"),
        "SoftmaxCrossEntropyWithLogits",
        "SparseSoftmaxCrossEntropyWithLogits",
        *("Pow", "Square", "SquaredDifference", "Sqrt", "Rsqrt", "Reciprocal"),
        *("RealDiv", "Div", "DivNoNan", "Xdivy", "L2Loss", "CTCLoss"),
        *("Mean", "Sum", "Prod", "Cumsum", "Cumprod", "CumulativeLogsumexp"),
        *("SegmentSum", "UnsortedSegmentSum", "BiasAddGrad"),
        *("Erf", "Erfc", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Atanh"),
        *("SqrtGrad", "RsqrtGrad", "Lgamma", "Digamma"),
    )
)
HEAD = (
    "| model | left in 16 bits, before | after | sums of gradients |"
    " float32 products, before and after | heads moved |"
    " error before | after | finite gradients, before and after |"
    " CPU time of a step, after to before |",
    "|:--|:--|:--|--:|--:|:--|--:|--:|:--|--:|",
)
_REPEATS = 5
# Their kernels are tried by `fit`, which leaves them where they add in float32.
_ADDING = ("Sum", "BiasAddGrad")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    models: str = flag("", "a Python file whose ZOO has the models")
    only: tuple[str, ...] = flag((), "names; none for all there are")
    preload: tuple[str, ...] = flag((), "modules they need, loaded once")
    precision: str = flag("mixed_float16", "mixed_float16 or mixed_bfloat16")
    timeout_seconds: int = flag(150, "for each model", minimum=1)
    output: str = flag("", "file for the table as well; none if empty")
    details: str = flag("", "file for all that was found, as JSON lines")

    def __post_init__(self):
        check_ranges(self)
        if not self.models:
            raise InputError("Pass --models=FILE.py, which has a ZOO.")
        if self.precision not in ("mixed_float16", "mixed_bfloat16"):
            raise InputError(
                f"Unknown precision {self.precision!r}; expected"
                " mixed_float16 or mixed_bfloat16."
            )


@dataclasses.dataclass(frozen=True)
class Counted:
    """Operations of a graph, by the names of their nodes.

    Attributes:
        left: sensitive operations of 16 bits, by type, but the next.
        gradient_sums: plain sums of 16 bits in gradients.
        float32_products: of the forward pass.
        products: how many there are of each dtype, in both passes.
    """

    left: dict[str, list[str]]
    gradient_sums: list[str]
    float32_products: list[str]
    products: dict[str, int]

    def by_type(self) -> dict[str, int]:
        """How many are left of each type, without sums of gradients."""
        return {op: len(names) for op, names in self.left.items()}


def count(graph: tf.Graph) -> Counted:
    """Counts in a graph and in the functions that it calls."""
    graph_def = graph.as_graph_def()
    live = _live(graph)
    outer = [node for node in graph_def.node if node.name in live]
    inner = [list(each.node_def) for each in graph_def.library.function]
    left = collections.defaultdict(list)
    sums, float32_products = [], []
    products: collections.Counter = collections.Counter()
    scaled = {id(n) for nodes in (outer, *inner) for n in _by_constants(nodes)}
    for node in (*outer, *(n for nodes in inner for n in nodes)):
        # A few operations have a list of types there.
        if "T" not in node.attr or not node.attr["T"].type:
            continue
        if id(node) in scaled:
            continue
        dtype = tf.as_dtype(node.attr["T"].type)
        is_gradient = "gradient" in node.name
        if PRODUCTS.match(node.op) and dtype.is_floating:
            products[dtype.name] += 1
            if dtype == tf.float32 and not is_gradient:
                float32_products.append(node.name)
        if node.op in SENSITIVE and dtype in (tf.float16, tf.bfloat16):
            if node.op in _ADDING and is_gradient:
                sums.append(node.name)
            else:
                left[node.op].append(node.name)
    return Counted(dict(left), sums, float32_products, dict(products))


def _live(graph: tf.Graph) -> set[str]:
    """The names of the nodes that something comes of."""
    operations = graph.get_operations()
    pending = [each for each in operations if _acts(each)]
    pending += [each.op for each in graph.outputs]
    pending += graph.control_outputs
    live: set[str] = set()
    while pending:
        each = pending.pop()
        if each.name not in live:
            live.add(each.name)
            pending += [tensor.op for tensor in each.inputs]
            pending += each.control_inputs
    return live


def _acts(operation: tf.Operation) -> bool:
    """Whether it runs though nothing comes of it, as far as one can tell."""
    try:
        return operation.op_def.is_stateful
    except tf.errors.InvalidArgumentError:
        # A call of a function by its name.
        return True


def _by_constants(nodes: Sequence[Any]) -> list[Any]:
    """The quotients by a constant that their 16 bits hold."""
    by_name = {node.name: node for node in nodes}
    found = []
    for node in nodes:
        if node.op not in ("RealDiv", "Div"):
            continue
        divisor = by_name.get(node.input[1].partition(":")[0])
        held = FORMATS.get(tf.as_dtype(node.attr["T"].type).name)
        if held is None or divisor is None or divisor.op != "Const":
            continue
        values = np.abs(tf.make_ndarray(divisor.attr["value"].tensor))
        if np.all((values >= held.min_normal) & (values <= held.max)):
            found.append(node)
    return found


def plain_step(model: keras.Model) -> Callable[..., Any]:
    """A forward and backward pass: what a plain `train_step` computes."""

    parameters = inspect.signature(model.compute_loss).parameters
    wants = {"training": True} if "training" in parameters else {}

    def step(data):
        # A loss of the model's own may take it apart.
        data = tf.nest.map_structure(lambda each: each, data)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, weight, **wants)
        sources = [v.value for v in model.trainable_variables]
        return loss, tape.gradient(loss, sources)

    return step


def trace(step: Callable[..., Any], batch: Any) -> Any:
    """The concrete function of a training step, as `fit` traces it."""
    traced = tf.function(summing_in_float32(step), autograph=False)
    concrete = traced.get_concrete_function(batch)
    # It owns the branches and loops that were made for its sums.
    concrete.owner = traced
    return concrete


def look_at(build: Callable[[], tuple], precision: str) -> dict[str, Any]:
    """Builds a model and tells what is in its step, as JSON can hold it."""
    model, batch = _built(build, precision)
    own = type(model).train_step is not keras.Model.train_step
    if own and not model.built:
        model.train_on_batch(*batch)
    step = model.train_step if own else plain_step(model)
    weights, reference = model.get_weights(), _reference(build, model, batch)
    found: dict[str, Any] = {"own_step": own}
    runs = {}
    for when in ("before", "after"):
        if when == "after":
            kept = _keep(model, batch[:2], found)
            found["heads"] = [
                each.path
                for each in kept
                if each.reason.startswith((heads.IN_FLOAT32, heads.WHOLE))
            ]
        part: dict[str, Any] = {}
        found[when] = part
        # A step moves averages of batches, which inference takes.
        model.set_weights(weights)
        part["error"] = _error(model, batch, reference)
        try:
            traced = trace(step, batch)
            counted = count(traced.graph)
            part["counted"] = dataclasses.asdict(counted)
            runs[when] = traced
            if not own:
                part["finite"] = _are_finite(traced(batch))
        except Exception as error:
            if when == "after":
                raise
            part["failed"] = f"{type(error).__name__}: {error}"[:300]
    if own:
        runs["after"](batch)
        found["after"]["finite"] = _are_finite(
            [v.value for v in model.trainable_variables]
        )
    if len(runs) == 2:
        found["ratio"] = _ratio(runs, batch)
    return found


def _keep(model, batch, found: dict[str, Any]) -> list[Float32Layer]:
    # As `fit` does: its own step may call a model on something else.
    for given in (None, batch):
        try:
            return keep_float32(model, batch=given)
        except InputError as error:
            refused = str(error)
    kept = keep_float32(model, outputs=False, batch=batch)
    found["refused"] = refused
    return kept


def row(name: str, found: dict[str, Any] | str) -> str:
    """A Markdown row of what was found, or of why nothing was."""
    if isinstance(found, str):
        return f"| {name} | **{found}** |" + " |" * 8
    before, after = found["before"], found["after"]
    return (
        "| "
        + " | ".join(
            [
                name,
                _left(before),
                _left(after),
                str(len(after["counted"]["gradient_sums"])),
                " and ".join(
                    _float32_products(each) for each in (before, after)
                ),
                _heads(found),
                *(_number(each.get("error")) for each in (before, after)),
                " and ".join(
                    _yes(each.get("finite")) for each in (before, after)
                ),
                _number(found.get("ratio"), 2),
            ]
        )
        + " |"
    )


def measure(config: Config) -> dict[str, Any]:
    """Looks at each model and prints the table; returns what was found."""
    path = str(pathlib.Path(config.models).resolve())
    # A server without threads loads what all need, once, and forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfamp", *config.preload])
    names = config.only or _names(path)
    rows, all_found = list(HEAD), {}
    print("\n".join(HEAD))
    for name in names:
        arguments = (path, name, config.precision)
        found = _apart(context, arguments, config.timeout_seconds)
        all_found[name] = found
        rows.append(row(name, found))
        print(rows[-1], flush=True)
        if config.details:
            with open(config.details, "a") as file:
                line = {"model": name, "precision": config.precision}
                file.write(json.dumps({**line, "found": found}) + "\n")
    if config.output:
        pathlib.Path(config.output).write_text("\n".join(rows) + "\n")
    return all_found


def _apart(context, arguments, timeout_seconds) -> dict[str, Any] | str:
    receiver, sender = context.Pipe(duplex=False)
    began = time.monotonic()
    process = context.Process(target=_look, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_seconds):
            return f"not done after {time.monotonic() - began:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _look(sender, path: str, name: str, precision: str) -> None:
    try:
        found = look_at(_load(path).ZOO[name], precision)
    except Exception as error:
        text = " ".join(str(error).split()).replace("|", "/")
        found = f"{type(error).__name__}: {text}"[:300]
    sender.send(found)


def _load(path: str) -> Any:
    name = pathlib.Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _names(path: str) -> list[str]:
    module = _load(path)
    if not getattr(module, "ZOO", None):
        raise InputError(f"{path} has no ZOO, a dict of functions.")
    return list(module.ZOO)


def _built(build, precision: str) -> tuple[keras.Model, Any]:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    model, loss, batch = build()
    if inspect.isfunction(loss):
        loss(model, _optimizer, {"auto_scale_loss": False})
    else:
        kwargs = {} if loss == "auto" else {"loss": loss}
        model.compile(_optimizer(), auto_scale_loss=False, **kwargs)
    batch = tf.nest.map_structure(tf.convert_to_tensor, tuple(batch))
    if not model.built:
        # Where it cannot, its training step builds it.
        try:
            model(batch[0], training=False)
        except Exception:
            if type(model).train_step is keras.Model.train_step:
                raise
    return model, batch


def _optimizer() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(1e-2)


def _outputs(model, batch) -> list[np.ndarray]:
    outputs = model(batch[0], training=False)
    return [
        np.asarray(keras.ops.cast(each, "float32"), "float64")
        for each in keras.tree.flatten(outputs)
        if each is not None
    ]


def _reference(build, model, batch) -> list[np.ndarray] | None:
    """The outputs in float32 with the same weights, if there are any."""
    precision = keras.config.dtype_policy().name
    try:
        twin, _ = _built(build, "float32")
        twin.set_weights(model.get_weights())
        for place in walk(twin):
            # What was adapted is in weights, and in constants made of them.
            if isinstance(place.layer, keras.layers.Normalization):
                restate_constants(place.layer)
        return _outputs(twin, batch)
    except Exception:
        return None
    finally:
        keras.config.set_dtype_policy(precision)


def _error(model, batch, reference) -> float | None:
    try:
        outputs = None if reference is None else _outputs(model, batch)
    except Exception:
        return None
    if outputs is None or len(outputs) != len(reference):
        return None
    distances = [
        float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))
        for a, b in zip(outputs, reference, strict=True)
        if b.size
    ]
    # NaN is the worst there is, and `max` loses it.
    return float(np.max(distances)) if distances else None


def _are_finite(values: Any) -> bool:
    return all(
        bool(tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(each))))
        for each in tf.nest.flatten(values)
        if each is not None and each.dtype.is_floating
    )


def _ratio(runs, batch) -> float:
    """The best CPU time of a step after to that before, run in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(_REPEATS):
        for when, traced in runs.items():
            began = time.process_time()
            traced(batch)
            best[when] = min(best[when], time.process_time() - began)
    return best["after"] / best["before"]


def _heads(found: dict[str, Any]) -> str:
    if "refused" in found:
        return "outputs refused"
    return ", ".join(found["heads"]) or "none"


def _left(part: dict[str, Any]) -> str:
    if "failed" in part:
        return "fails"
    left = part["counted"]["left"]
    return ", ".join(f"{op} {len(names)}" for op, names in left.items()) or "0"


def _float32_products(part: dict[str, Any]) -> str:
    if "failed" in part:
        return "-"
    return str(len(part["counted"]["float32_products"]))


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def main(argv: Sequence[str]) -> int:
    """The program: flags in, a table and an exit status out."""
    return run(Config, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
