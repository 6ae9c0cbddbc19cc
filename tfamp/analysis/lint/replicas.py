"""Rules for several replicas, and for TPUs."""

from collections.abc import Iterator

from tfamp.analysis.lint.findings import ERROR, Finding, Rule
from tfamp.analysis.lint.scaling import float16_layers, wrapped
from tfamp.analysis.lint.view import View, unwrapped
from tfamp.distribute.strategy import devices_of
from tfamp.scaling.optimizer import LossScaleOptimizer

CLIPPING_BEFORE_REDUCTION = Rule(
    "clipping-before-reduction",
    "Keras clips the gradients of each replica and not their sum.",
)
ACCUMULATION_ON_REPLICAS = Rule(
    "accumulation-on-replicas",
    "gradient_accumulation_steps fails under a strategy of several replicas.",
)
EMA_OVERWRITE_ON_REPLICAS = Rule(
    "ema-overwrite-on-replicas",
    "ema_overwrite_frequency fails under a strategy of several replicas.",
)
STEPS_PER_EXECUTION_ON_REPLICAS = Rule(
    "steps-per-execution-on-replicas",
    "steps_per_execution above 1 fails under a strategy of several replicas.",
)
FLOAT16_ON_TPU = Rule(
    "float16-on-tpu",
    "Layers compute in float16, and a TPU's matrix units take bfloat16.",
)
RULES = (
    CLIPPING_BEFORE_REDUCTION,
    ACCUMULATION_ON_REPLICAS,
    EMA_OVERWRITE_ON_REPLICAS,
    STEPS_PER_EXECUTION_ON_REPLICAS,
    FLOAT16_ON_TPU,
)

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")


def check(view: View) -> Iterator[Finding]:
    """Findings about the strategy that a model was built under."""
    if view.replicas > 1:
        for optimizer in view.optimizers:
            yield from _check_optimizer(view, optimizer)
        steps = view.model.steps_per_execution
        if view.model.compiled and steps > 1:
            yield Finding(
                STEPS_PER_EXECUTION_ON_REPLICAS.name,
                ERROR,
                "",
                f"keras.Model.fit fails with steps_per_execution={steps} on "
                f"{view.replicas} replicas.",
                "model.steps_per_execution = 1\n"
                f"tfamp.fit(model, dataset, steps_per_loop={steps})",
            )
    yield from _check_tpu(view)


def _check_optimizer(view: View, optimizer) -> Iterator[Finding]:
    is_ours = isinstance(optimizer, LossScaleOptimizer)
    for each in unwrapped(optimizer):
        steps = getattr(each, "gradient_accumulation_steps", None)
        if steps:
            holder = "optimizer"
            if each is not optimizer:
                holder += ".inner_optimizer"
            yield Finding(
                ACCUMULATION_ON_REPLICAS.name,
                ERROR,
                "",
                f"gradient_accumulation_steps={steps} fails on "
                f"{view.replicas} replicas.",
                f"{holder}.gradient_accumulation_steps = None\n"
                f"tfamp.fit(model, dataset, microbatches={steps})",
            )
        if is_ours:
            continue
        for name in _CLIPPING:
            value = getattr(each, name, None)
            if value is not None:
                yield Finding(
                    CLIPPING_BEFORE_REDUCTION.name,
                    ERROR,
                    "",
                    f"{type(each).__name__} clips ({name}={value:g}) the "
                    f"gradients of each of {view.replicas} replicas and not "
                    "their sum.",
                    wrapped(view, optimizer),
                )
        if each.use_ema and each.ema_overwrite_frequency:
            yield Finding(
                EMA_OVERWRITE_ON_REPLICAS.name,
                ERROR,
                "",
                "ema_overwrite_frequency="
                f"{each.ema_overwrite_frequency} fails on {view.replicas} "
                "replicas.",
                wrapped(view, optimizer),
            )


def _check_tpu(view: View) -> Iterator[Finding]:
    layers = float16_layers(view)
    devices = devices_of(view.model.distribute_strategy)
    if layers and any("TPU" in device for device in devices):
        yield Finding(
            FLOAT16_ON_TPU.name,
            ERROR,
            layers[0],
            f"{len(layers)} layers compute in float16, this one first; a "
            "TPU's matrix units take bfloat16.",
            'keras.config.set_dtype_policy("mixed_bfloat16")',
        )
