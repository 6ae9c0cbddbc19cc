"""What tuning found: scores, the path, the map, and their JSON.

`tune.json`, schema `tfamp.tune/1`; numbers that are not finite are null:

- `recipe`: that the command was given; "" where there was none.
- `model`, `precision` (of what is not in float32), `steps` (batches measured
  on), `budget`, `noise` (of the gradient between batches, relative to its
  length), `limit` (their product: the error that is allowed), `loss_scale`.
- `scores`: `layer` and `score`, the relative error of the whole gradient with
  that layer alone in 16 bits; the most sensitive first.
- `path`: `layer` (null for none) that was put back to float32, and the `error`
  with all others in 16 bits.
- `float32_layers`: `layer` and `reason`.
- `costs`: of `float32`, `all` in 16 bits, and `tuned`: `error`, and
  `milliseconds` of a forward and a backward pass, of the model as it runs.
- `narrow_shares`: null, or the share of the operations of matrix products that
  are in 16 bits, for `all` and `tuned`.
- `unseen_layers`: those that a step did not call.
- `dtype_policy_map`: the config of a `keras.dtype_policies.DTypePolicyMap`.
- `policy_paths`: by layer, how that map knows it and the layers in it.
- `pathless_layers`: those in float32 that it does not reach; tfamp does.
- `runs`, `seconds`: what it took.
- `environment`: device, versions, command and time.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from tfamp.analysis.page import environment
from tfamp.analysis.tune.cost import Cost
from tfamp.analysis.tune.units import Unit, units_of
from tfamp.errors import InputError
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.layers.float8 import float8
from tfamp.precision.keep_float32 import forget_traces
from tfamp.precision.layer_paths import walk
from tfamp.precision.policy import FLOAT8, policy_name

SCHEMA = "tfamp.tune/1"


class PathStep(NamedTuple):
    """A layer that was put back, None for none, and the error of the rest."""

    layer: str | None
    error: float


@dataclasses.dataclass(frozen=True, eq=False)
class TuneReport:
    """What `tfamp.tune` found.

    Attributes:
        model: the model's name.
        precision: of the layers that are not in float32.
        steps: batches that were measured on.
        budget: the error that is allowed, as a share of the noise.
        noise: how far the gradient of one batch is from the mean of all,
            relative to its length.
        scores: by path of a layer, the relative error of the whole gradient
            where it alone computes in 16 bits; inf where that is not finite.
        path: the layers put back to float32, in order, and the error with all
            others in 16 bits; the first entry has none.
        reasons: by path of a layer put back, why.
        loss_scale: at which float16 was measured; 1 for bfloat16.
        costs: of "float32", "all" in 16 bits and "tuned": the `error` and the
            `milliseconds` of a forward and a backward pass.
        narrow_shares: of "all" and "tuned": the share of the products'
            operations that are in 16 bits; None where they cannot be counted.
        unseen_layers: paths of layers that a step did not call.
        policy_paths: by path, how a `DTypePolicyMap` knows the layers.
        pathless: by path, the layers of it that no `DTypePolicyMap` reaches.
        kept_paths: how it knows those that were in float32 before.
        runs: steps that were run.
        seconds: that it took.
        recipe: that the command was given.
    """

    model: str
    precision: str
    steps: int
    budget: float
    noise: float
    scores: Mapping[str, float]
    path: tuple[PathStep, ...]
    reasons: Mapping[str, str]
    loss_scale: float
    costs: Mapping[str, Cost]
    narrow_shares: Mapping[str, float] | None
    unseen_layers: tuple[str, ...]
    policy_paths: Mapping[str, tuple[str, ...]]
    pathless: Mapping[str, tuple[str, ...]]
    kept_paths: tuple[str, ...]
    runs: int
    seconds: float
    recipe: str = ""

    @property
    def float32_layers(self) -> tuple[str, ...]:
        """Paths of the layers to compute in float32, the worst first."""
        return tuple(self.reasons)

    @property
    def limit(self) -> float:
        """The relative error of the gradient that is allowed."""
        return self.budget * self.noise

    @property
    def unseen_error(self) -> bool:
        """Whether the model as it runs errs more than its layers do.

        What it computes outside of them cannot be put back by a layer.
        """
        error = self.costs["tuned"]["error"]
        return error > max(2 * self.path[-1].error, self.limit)

    @property
    def unmapped_layers(self) -> tuple[str, ...]:
        """Layers put back that a `DTypePolicyMap` does not reach.

        Keras gives no path to layers without weights such as ReLU and Softmax.
        """
        return tuple(e for path in self.reasons for e in self.pathless[path])

    @property
    def reason(self) -> str:
        """What was found, in words."""
        error, limit = self.path[0].error, self.limit
        text = (
            f"With all layers in {self.precision} the gradient is "
            f"{_off(error)}; batches differ by {self.noise:.2%}, and "
            f"{self.budget:g} of that, {limit:.2%}, is allowed. "
        )
        kept = len(self.reasons)
        if kept:
            text += (
                f"With {kept} {'layer' if kept == 1 else 'layers'} of "
                f"{len(self.scores)} in float32 it is "
                f"{_off(self.path[-1].error)}."
            )
        else:
            text += "No layer needs float32."
        if self.unseen_error:
            text += (
                " As the model runs it is "
                f"{_off(self.costs['tuned']['error'])}: what it computes "
                "outside of its layers makes the difference; "
                "tfamp.keep_float32(model, operations=True) may help."
            )
        if self.unmapped_layers:
            text += (
                " Keras's DTypePolicyMap alone does not reach "
                f"{', '.join(self.unmapped_layers)}; tfamp.set_precision of "
                "tune.json and report.apply(model) do."
            )
        return text

    def dtype_policy_map(self) -> keras.dtype_policies.DTypePolicyMap:
        """The choice as Keras takes it.

        `keras.config.set_dtype_policy(report.dtype_policy_map())` before the
        model is built anew, with the same names of model and layers; or
        `tfamp.set_precision("tune.json")`, which does that, and reaches
        `unmapped_layers` too, where tfamp first gets the model.
        """
        policy_map = keras.dtype_policies.DTypePolicyMap(
            keras.dtype_policies.get(policy_name(self.precision))
        )
        paths = [p for each in self.reasons for p in self.policy_paths[each]]
        for path in dict.fromkeys([*self.kept_paths, *paths]):
            policy_map[path] = keras.dtype_policies.get("float32")
        return policy_map

    def apply(self, model: keras.Model) -> None:
        """Gives the layers of a built model the precisions that were found.

        Args:
            model: the one that was tuned, or another with its layers; for
                float8 one whose optimizer is not built.

        Raises:
            InputError: it lacks one of them, or cannot take float8; it is as
                it was then.
        """
        units = {unit.path: unit for unit in self._units_of(model)}
        for path in self.policy_paths:
            if path not in units:
                (near,) = difflib.get_close_matches(path, units, 1, 0) or ("",)
                raise InputError(
                    f"Model {model.name!r} has no layer {path!r}, which was "
                    f"tuned; the nearest is {near!r}."
                )
        before = []
        for path in self.policy_paths:
            name = "float32" if path in self.reasons else self.precision
            for layer in units[path].layers:
                before.append((layer, layer.dtype_policy))
                layer.dtype_policy = keras.dtype_policies.get(policy_name(name))
        if self.precision == FLOAT8:
            try:
                float8(model)
            except InputError:
                for layer, policy in before:
                    layer.dtype_policy = policy
                raise
        forget_traces(model)

    def _units_of(self, model: keras.Model) -> list[Unit]:
        """The units of a model, cut as those that were tuned."""
        cut: set[type] = set()
        whole: set[type] = set()
        for place in walk(model):
            if place.path in self.policy_paths:
                inside = f"{place.path}/"
                is_cut = any(p.startswith(inside) for p in self.policy_paths)
                (cut if is_cut else whole).add(type(place.layer))
        return units_of(model, whole - cut)

    def record(self) -> dict[str, Any]:
        """The report as JSON holds it; see this module's docstring."""
        order = sorted(self.scores, key=self.scores.__getitem__, reverse=True)
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "model": self.model,
            "precision": self.precision,
            "steps": self.steps,
            "budget": self.budget,
            "noise": self.noise,
            "limit": self.limit,
            "loss_scale": self.loss_scale,
            "reason": self.reason,
            "scores": [
                {"layer": each, "score": _finite(self.scores[each])}
                for each in order
            ],
            "path": [
                {"layer": each.layer, "error": _finite(each.error)}
                for each in self.path
            ],
            "float32_layers": [
                {"layer": layer, "reason": why}
                for layer, why in self.reasons.items()
            ],
            "costs": {
                name: {key: _finite(value) for key, value in cost.items()}
                for name, cost in self.costs.items()
            },
            "narrow_shares": self.narrow_shares and dict(self.narrow_shares),
            "unseen_layers": list(self.unseen_layers),
            "dtype_policy_map": keras.dtype_policies.serialize(
                self.dtype_policy_map()
            ),
            "policy_paths": {
                path: list(paths) for path, paths in self.policy_paths.items()
            },
            "pathless_layers": list(self.unmapped_layers),
            "runs": self.runs,
            "seconds": self.seconds,
            "environment": environment.describe(),
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _off(error: float) -> str:
    return f"off by {error:.2%}" if math.isfinite(error) else "not finite"
