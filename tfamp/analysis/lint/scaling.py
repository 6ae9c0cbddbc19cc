"""Rules for loss scaling: whether there is one, and only one."""

import re
from collections.abc import Iterator

import keras

from tfamp.analysis.lint.findings import ERROR, WARNING, Finding, Rule
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.step import OptimizerUse
from tfamp.analysis.lint.view import View, compiled_with, unwrapped
from tfamp.precision.product_policy import product_dtype
from tfamp.scaling.optimizer import LossScaleOptimizer

NO_LOSS_SCALING = Rule(
    "no-loss-scaling",
    "Layers compute in float16 and the loss is not scaled: gradients below "
    "2^-24 are 0.",
)
STOCK_LOSS_SCALING = Rule(
    "stock-loss-scaling",
    "Keras's LossScaleOptimizer looks at the gradients of the first replica "
    "only, and its scale has no floor and no ceiling.",
)
DOUBLE_LOSS_SCALING = Rule(
    "double-loss-scaling",
    "The loss is scaled twice, or unscaled twice.",
)
UNSCALED_TRAIN_STEP = Rule(
    "unscaled-train-step",
    "A train_step applies gradients of a loss that was not scaled: the "
    "optimizer divides them by the scale, and the steps are that much too "
    "small.",
)
CLIPPED_SCALED_GRADIENTS = Rule(
    "clipped-scaled-gradients",
    "A train_step clips gradients while they are scaled: the threshold is "
    "that many times too low.",
)
FLOAT16_WIRE = Rule(
    "float16-wire",
    "Gradients cross between replicas in float16 and the loss is not scaled: "
    "those below 2^-24 are 0.",
)
STOCK_FLOAT8 = Rule(
    "stock-float8",
    "Keras's float8 scales tensors by what they were two steps before, and in "
    "float16 its scales underflow: gradients are 0.",
)
RULES = (
    NO_LOSS_SCALING,
    FLOAT16_WIRE,
    STOCK_FLOAT8,
    STOCK_LOSS_SCALING,
    DOUBLE_LOSS_SCALING,
    UNSCALED_TRAIN_STEP,
    CLIPPED_SCALED_GRADIENTS,
)

_UNDERFLOW = "; in float16 they underflow: gradients are 0."
_CLIPPING = re.compile(r"(^|/)(clip_by_|global_norm)")


def check(view: View) -> Iterator[Finding]:
    """Findings about loss scaling."""
    yield from _check_stock_float8(view)
    for optimizer in view.optimizers:
        yield from _check_wrapping(view, optimizer)
        if view.step is not None:
            use = view.step.uses[id(optimizer)]
            yield from _check_use(view.step.graph, optimizer, use)


def _check_stock_float8(view: View) -> Iterator[Finding]:
    for place in view.places:
        if getattr(place.layer, "quantization_mode", None) == "float8":
            is_float16 = place.layer.compute_dtype == "float16"
            yield Finding(
                STOCK_FLOAT8.name,
                ERROR if is_float16 else WARNING,
                place.path,
                "Keras's float8 is two steps late, and its scales stay 1 "
                "where training=True is forgotten"
                + (_UNDERFLOW if is_float16 else "."),
                "model = build_model()  # without quantize('float8')\n"
                "tfamp.float8(model)",
            )


def float16_layers(view: View) -> list[str]:
    """Paths of the layers with weights to train that compute in float16."""
    return [
        place.path
        for place in view.places
        if "float16" in (place.layer.compute_dtype, product_dtype(place.layer))
        and place.layer.trainable_weights
        and not isinstance(place.layer, keras.Model)
    ]


def wrapped(view: View, optimizer: keras.optimizers.Optimizer) -> str:
    """Code that wraps what an optimizer wraps, once, and compiles anew."""
    name = "optimizer"
    each = optimizer
    # `compile` wraps by itself: then the caller's optimizer is the inner one.
    is_callers = (
        optimizer is not view.model.optimizer
        or optimizer in compiled_with(view.model, "optimizer")
    )
    while isinstance(each, keras.optimizers.LossScaleOptimizer):
        if is_callers or each is not optimizer:
            name += ".inner_optimizer"
        each = each.inner_optimizer
    precision = "mixed_float16" if float16_layers(view) else "mixed_bfloat16"
    lines = [f'optimizer = tfamp.wrap_optimizer({name}, "{precision}")']
    if view.replicas > 1:
        lines = ["with strategy.scope():", f"    {lines[0]}"]
    lines.append(
        "model.compile(\n"
        "    optimizer, loss=loss, metrics=metrics, auto_scale_loss=False\n"
        ")"
    )
    return "\n".join(lines)


def _check_wrapping(view, optimizer) -> Iterator[Finding]:
    scalers = [
        each
        for each in unwrapped(optimizer)
        if isinstance(each, keras.optimizers.LossScaleOptimizer)
    ]
    factors = [
        each
        for each in unwrapped(optimizer)
        if getattr(each, "loss_scale_factor", None)
    ]
    layers = float16_layers(view)
    if layers and not factors and not any(map(_scales, scalers)):
        what = (
            "and the optimizer's scale is fixed at 1"
            if scalers
            else f"and {type(optimizer).__name__} does not scale the loss"
        )
        yield Finding(
            NO_LOSS_SCALING.name,
            ERROR,
            layers[0],
            f"{len(layers)} layers compute in float16, this one first, {what}: "
            "gradients below 2^-24 are 0.",
            wrapped(view, optimizer),
        )
    elif scalers and not factors and not any(map(_scales, scalers)):
        yield from _check_wire(scalers[0])
    if len(scalers) + len(factors) > 1:
        yield Finding(
            DOUBLE_LOSS_SCALING.name,
            ERROR,
            "",
            f"{' around '.join(type(e).__name__ for e in scalers)}"
            + (
                " scale the loss twice."
                if len(scalers) > 1
                else " and the loss_scale_factor of "
                f"{type(factors[0]).__name__} unscale the gradients twice."
            ),
            wrapped(view, optimizer)
            if len(scalers) > 1
            else "optimizer.inner_optimizer.loss_scale_factor = None",
        )
    elif any(not isinstance(each, LossScaleOptimizer) for each in scalers):
        yield _stock_finding(view, optimizer)


def _check_wire(scaler) -> Iterator[Finding]:
    if getattr(scaler, "all_reduce_dtype", None) == "float16":
        yield Finding(
            FLOAT16_WIRE.name,
            ERROR,
            "",
            "Gradients cross between replicas in float16, and the optimizer's "
            "scale is fixed at 1: those below 2^-24 are lost.",
            "optimizer = tfamp.LossScaleOptimizer(\n"
            "    optimizer.inner_optimizer, min_scale=2.0**-24\n"
            ")\n"
            "model.compile(\n"
            "    optimizer, loss=loss, metrics=metrics, auto_scale_loss=False\n"
            ")",
        )


def _stock_finding(view, optimizer) -> Finding:
    several = view.replicas > 1
    return Finding(
        STOCK_LOSS_SCALING.name,
        ERROR if several else WARNING,
        "",
        "Keras's LossScaleOptimizer "
        + (
            f"looks at the gradients of one of {view.replicas} replicas: an "
            "overflow on another writes inf into the weights."
            if several
            else "has no floor and no ceiling: the scale can reach 0 and inf."
        ),
        wrapped(view, optimizer),
    )


def _scales(optimizer) -> bool:
    is_fixed = getattr(optimizer, "dynamic", True) is False
    return not (is_fixed and optimizer.initial_scale == 1.0)


def _check_use(graph: Graph, optimizer, use: OptimizerUse) -> Iterator[Finding]:
    is_scaler = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not (is_scaler and _scales(optimizer)):
        return
    scales = {node.name for node in use.scales}
    unscaled = [
        each for each in use.gradients if not _depends(graph, each, scales)
    ]
    if unscaled:
        yield Finding(
            UNSCALED_TRAIN_STEP.name,
            ERROR,
            "",
            f"train_step gives {type(optimizer).__name__} {len(unscaled)} of "
            f"{len(use.gradients)} gradients of a loss that was not scaled: "
            "they are divided by the scale all the same.",
            "loss, gradients = tfamp.value_and_gradients(\n"
            "    loss_fn, variables, optimizer\n"
            ")\n"
            "optimizer.apply(gradients, variables)",
        )
    elif _clips(graph, use, scales):
        yield Finding(
            CLIPPED_SCALED_GRADIENTS.name,
            ERROR,
            "",
            f"train_step clips gradients before {type(optimizer).__name__} "
            "divides them by the scale: the threshold is that many times too "
            "low. Let the wrapped optimizer clip.",
            f"optimizer = {_clipping_optimizer(optimizer)}",
        )


def _clipping_optimizer(optimizer) -> str:
    inner = type(list(unwrapped(optimizer))[-1]).__name__
    return (
        "tfamp.wrap_optimizer(\n"
        f"    keras.optimizers.{inner}(learning_rate, global_clipnorm=1.0),\n"
        '    "mixed_float16",\n'
        ")"
    )


def _depends(graph: Graph, node: Node, names: set[str]) -> bool:
    return any(
        each.name in names for each in graph.upstream([node], lambda n: True)
    )


def _clips(graph: Graph, use: OptimizerUse, scales: set[str]) -> bool:
    before = {
        each.name for each in graph.upstream(use.scaled_losses, lambda n: True)
    }
    return any(
        _CLIPPING.search(each.name)
        and not each.is_backward
        and each.name not in before
        and _depends(graph, each, scales)
        for each in graph.upstream(use.gradients, lambda n: True)
    )
