"""What probing found: the measured tensors, the advice, and their JSON.

`probe.json`, schema `tfamp.probe/1`:

- `recipe`: that the command was given; "" where there was none.
- `model`, `steps`: its name, and how many training steps were measured.
- `recommended_precision`, `recommended_scale`, `float32_layers`, `reason`.
- `float16_scale`: the scale at which float16 loses least, whether or not that
  is little enough; null where it overflows at every scale.
- `dtype_policy_map`: the config of a `keras.dtype_policies.DTypePolicyMap`.
- `pathless_layers`: those in float32 that it does not reach; tfamp does.
- `scales`: the loss scales of all lists by scale.
- `tensors`: each with `layer`, `kind` (`activation`, `activation_gradient` or
  `gradient`), `name` (of the weight, or the number of the output), `is_float32`
  (in float32 already), the numbers `values`, `zeros`, `infinite`, `nan`,
  `tiny` (float32 subnormals), the `histogram` of the others (`counts[i]`
  values of 2**(`first_exponent` + i) to twice that), and `losses`: by format
  the shares `zero`, `subnormal` and `overflow` of the values that are finite
  and not zero, lists by scale; those of an `activation`, which the scale does
  not move, have one entry.
- `unseen_layers`: those whose tensors could not be seen.
- `environment`: device, versions, command and time.
- `observed`: null, or `scale` and `tensors`: `layer`, `kind`, `name`, and
  `predicted` and `observed`, each with `zero`, `subnormal`, `normal`,
  `overflow`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfamp.analysis.page import environment
from tfamp.analysis.probe import format_losses
from tfamp.analysis.probe.advice import Advice, ProbedTensor
from tfamp.analysis.probe.histogram import (
    FLOAT8_NAMES,
    FORMAT_NAMES,
    MIN_EXPONENT,
    Histogram,
)
from tfamp.analysis.probe.observed import Observation
from tfamp.files.output import make_folder, output_folder, write_atomically

SCHEMA = "tfamp.probe/1"


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeReport:
    """What `tfamp.probe` found.

    Attributes:
        model: the model's name.
        steps: training steps that were measured.
        tensors: each weight gradient, each layer's output and the gradient
            that arrives there, in the order of the step.
        advice: what to do, and why.
        policy_paths: by a layer's path, the one by which a `DTypePolicyMap`
            knows it; None where Keras gives it none, as to a ReLU.
        unseen_layers: paths of layers of which nothing was seen: they were
            not called, or inside of a loop, as the cells of recurrent layers.
        observations: `observe`'s, where it was asked.
        observed_scale: the loss scale that those are at.
        recipe: that the command was given.
    """

    model: str
    steps: int
    tensors: tuple[ProbedTensor, ...]
    advice: Advice
    policy_paths: Mapping[str, str | None]
    unseen_layers: tuple[str, ...] = ()
    observations: tuple[Observation, ...] = ()
    observed_scale: float | None = None
    recipe: str = ""

    @property
    def recommended_precision(self) -> str:
        """ "mixed_float16", "mixed_bfloat16" or "float32"."""
        return self.advice.precision

    @property
    def recommended_scale(self) -> float:
        """The loss scale for that precision: 1 where it needs none."""
        return self.advice.scale

    @property
    def float32_layers(self) -> tuple[str, ...]:
        """Paths of layers to keep in float32, for `tfamp.keep_float32`."""
        return self.advice.float32_layers

    @property
    def reason(self) -> str:
        """Why that is recommended."""
        return self.advice.reason

    def dtype_policy_map(self) -> keras.dtype_policies.DTypePolicyMap:
        """The advice as Keras takes it.

        `keras.config.set_dtype_policy(report.dtype_policy_map())` before the
        model is built anew, with the same names of model and layers. Layers
        that were in float32 while others were not are so in it, too.
        `tfamp.set_precision("probe.json")` reaches `unmapped_layers` as well.
        """
        policy_map = keras.dtype_policies.DTypePolicyMap(
            keras.dtype_policies.get(self.recommended_precision)
        )
        # Several layers of a shared path have one entry.
        paths = (self.policy_paths[layer] for layer in self._in_float32())
        for path in dict.fromkeys(path for path in paths if path):
            policy_map[path] = keras.dtype_policies.get("float32")
        return policy_map

    @property
    def unmapped_layers(self) -> tuple[str, ...]:
        """Layers to keep in float32 that a `DTypePolicyMap` does not reach."""
        kept = self._in_float32()
        return tuple(each for each in kept if not self.policy_paths[each])

    def _in_float32(self) -> dict[str, None]:
        kept = dict.fromkeys(self.float32_layers)
        if self.recommended_precision != "float32":
            kept |= dict.fromkeys(t.layer for t in self.tensors if t.is_float32)
        return kept

    def record(self) -> dict[str, Any]:
        """The report as JSON holds it; see this module's docstring."""
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "model": self.model,
            "steps": self.steps,
            "recommended_precision": self.recommended_precision,
            "recommended_scale": self.recommended_scale,
            "float32_layers": list(self.float32_layers),
            "reason": self.reason,
            "float16_scale": self.advice.float16_scale,
            "dtype_policy_map": keras.dtype_policies.serialize(
                self.dtype_policy_map()
            ),
            "pathless_layers": list(self.unmapped_layers),
            "scales": list(format_losses.SCALES),
            "tensors": [*map(_tensor_record, self.tensors)],
            "unseen_layers": list(self.unseen_layers),
            "environment": environment.describe(),
            "observed": self._observed_record(),
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON.

        Raises:
            InputError: the folder cannot be written.
        """
        path = pathlib.Path(path).expanduser()
        make_folder(output_folder(path.parent))
        text = json.dumps(self.record(), indent=1, allow_nan=False)
        write_atomically(path, text + "\n")

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the gradients' histogram, what scales lose, and all layers.

        Args:
            path: its suffix says the format: .svg, .png or .pdf.

        Raises:
            InputError: matplotlib is not installed, the suffix is another
                one, or the folder cannot be written.
        """
        from tfamp.analysis.probe import plots

        plots.save_overview(self.record(), path)

    def _observed_record(self) -> dict[str, Any] | None:
        if self.observed_scale is None:
            return None
        return {
            "scale": self.observed_scale,
            "tensors": [*map(dataclasses.asdict, self.observations)],
        }


def _tensor_record(tensor: ProbedTensor) -> dict[str, Any]:
    histogram = tensor.histogram
    return {
        "layer": tensor.layer,
        "kind": tensor.kind,
        "name": tensor.name,
        "is_float32": tensor.is_float32,
        "values": histogram.values,
        "zeros": histogram.zeros,
        "tiny": histogram.tiny,
        "infinite": histogram.infinite,
        "nan": histogram.nan,
        "histogram": _histogram_record(histogram),
        "losses": {
            name: _losses_record(histogram, name, tensor.is_scaled)
            for name in FORMAT_NAMES
        },
        "float8": {
            name: _float8_record(histogram, name) for name in FLOAT8_NAMES
        },
    }


def _float8_record(histogram: Histogram, format_name: str) -> dict[str, float]:
    scale, shares = format_losses.float8_shares(histogram, format_name)
    return {
        "scale": scale,
        "zero": round(shares.zero, 6),
        "subnormal": round(shares.subnormal, 6),
    }


def _histogram_record(histogram: Histogram) -> dict[str, Any]:
    counts = histogram.by_exponent
    (held,) = np.nonzero(counts)
    if not held.size:
        return {"first_exponent": 0, "counts": []}
    first, last = int(held[0]), int(held[-1])
    return {
        "first_exponent": MIN_EXPONENT + first,
        "counts": counts[first : last + 1].tolist(),
    }


def _losses_record(
    histogram: Histogram, format_name: str, is_scaled: bool
) -> dict[str, list[float]]:
    by_scale = format_losses.shares_by_scale(histogram, format_name)
    if not is_scaled:
        by_scale = by_scale[:1]
    zero, subnormal, _, overflow = np.round(by_scale, 6).T.tolist()
    return {"zero": zero, "subnormal": subnormal, "overflow": overflow}
