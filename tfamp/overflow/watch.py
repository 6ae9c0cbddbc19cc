"""Steps that were not finite, and every move of the loss scale: what is said.

Nothing is read from the device until a step was skipped or a scale moved; the
graph call ends there, so that the host knows the step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from tfamp.errors import InputError, LossScaleError
from tfamp.overflow.blame import Blame
from tfamp.scaling.optimizer import LossScaleOptimizer

ACTIONS = ("log", "ignore", "blame", "stop")

# Overflows in a row at the floor of the scale until training is given up: a
# few bad batches are survivable, a model that is broken is not.
PATIENCE_AT_FLOOR = 20

# A stretch is one or more skipped steps in a row. Of these first ones each is
# replayed, then those whose number is a power of two: a replay takes as long
# as many steps, and the hundredth overflow has nothing new to say.
ALL_STRETCHES = 8

# Overflows in a row that a dynamic scale may need to come down: 2^16 to 2^6.
_NORMAL_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class ScaleEvent:
    """A step that was skipped or moved a scale, or where a run begins.

    Attributes:
        step: steps of the run so far, this one included.
        epoch: from 0.
        optimizer: its name where there are several.
        scale: from the next step on.
        reason: "start", "resumed", "overflow", "growth" or "set".
        blame: of an overflow that was replayed.
    """

    step: int
    epoch: int
    optimizer: str | None
    scale: float
    reason: str
    blame: Blame | None = None


class _Reading(NamedTuple):
    """What the counters of an optimizer said."""

    scale: float
    skipped: int
    in_a_row: int


class OverflowWatch:
    """Follows the loss scales of a training run.

    Args:
        optimizers: by the name of the attribute that holds it; a GAN has two.
        action: what to do about skipped steps: "ignore" them, "log" a line at
            reports, "blame" what overflowed first, or "stop".
        replay: says what was at fault in the step that was skipped last; None
            where it cannot be told.
        listeners: called with each event.

    Raises:
        InputError: for an unknown action.
    """

    def __init__(
        self,
        optimizers: Mapping[str, LossScaleOptimizer],
        action: str,
        replay: Callable[[], Blame] | None = None,
        listeners: Sequence[Callable[[ScaleEvent], None]] = (),
    ):
        if action not in ACTIONS:
            raise InputError(
                f"Unknown on_overflow {action!r}; expected one of "
                f"{', '.join(ACTIONS)}."
            )
        self._optimizers = optimizers
        self._action = action
        self._replay = replay
        self._listeners = listeners
        self._stretches = 0
        self._last = self._read()
        self._reported = self._skipped()
        self._at_epoch_begin = self._skipped()

    def begin(self, epoch: int, step: int, is_resumed: bool) -> None:
        """Tells the scales that a run begins with."""
        self._last = self._read()
        for name, now in self._last.items():
            reason = "resumed" if is_resumed else "start"
            self._tell(step, epoch, name, now.scale, reason)

    def begin_epoch(self, skipped: Mapping[str, int] | None = None) -> None:
        """From here on, `logs` counts the skipped steps of a new epoch.

        Args:
            skipped: what `skipped_at_epoch_begin` was in the run that this
                one resumes in the middle of an epoch.
        """
        # Restored counts are no news.
        self._reported = self._skipped()
        self._at_epoch_begin = dict(skipped or self._reported)

    @property
    def skipped_at_epoch_begin(self) -> dict[str, int]:
        """Skipped steps of the whole run, by optimizer, up to this epoch."""
        return dict(self._at_epoch_begin)

    def logs(self) -> dict[str, float]:
        """`loss_scale` and `skipped_steps`, with a suffix if they are many."""
        logs = {}
        for name, now in self._read().items():
            suffix = f"_{name}" if self._has_several else ""
            logs[f"loss_scale{suffix}"] = now.scale
            logs[f"skipped_steps{suffix}"] = (
                now.skipped - self._at_epoch_begin[name]
            )
        return logs

    def look(self, where: str, epoch: int, step: int) -> None:
        """Acts on a step that was skipped or moved a scale; call it after it.

        Args:
            where: the place in training, for messages.
            epoch: the epoch, from 0.
            step: steps of the run so far.

        Raises:
            LossScaleError: where `action` is "stop" and the step was skipped,
                or where the scale is at its floor and overflows stay.
        """
        before, self._last = self._last, self._read()
        skips = [
            name
            for name, now in self._last.items()
            if now.skipped > before[name].skipped
        ]
        blame = None
        if self._replay is not None and self._wants_blame(skips, before):
            blame = self._replay()
        for name, now in self._last.items():
            if name in skips:
                self._tell(step, epoch, name, now.scale, "overflow", blame)
            elif now.scale != before[name].scale:
                has_grown = now.scale > before[name].scale
                reason = "growth" if has_grown else "set"
                self._tell(step, epoch, name, now.scale, reason)
        for name in skips:
            self._raise_if_over(where, name, blame)
        if blame is not None and self._action == "blame":
            self._log_blame(where, skips, blame)
            for name in skips:
                # Told: `check` counts the others.
                self._reported[name] += 1

    def check(self, where: str) -> None:
        """Logs, where that is asked for, what was skipped since the last time.

        Args:
            where: the place in training, for the message.
        """
        now = self._read()
        if self._action in ("log", "blame"):
            for name, each in now.items():
                new = each.skipped - self._reported[name]
                if new:
                    logging.warning(
                        "%s: skipped %d step(s) that were not finite; %s",
                        where,
                        new,
                        self._scale_now(name, each),
                    )
        self._reported = {name: each.skipped for name, each in now.items()}

    @property
    def _has_several(self) -> bool:
        return len(self._optimizers) > 1

    def _wants_blame(self, skips, before: Mapping[str, _Reading]) -> bool:
        if not skips:
            return False
        if self._action == "stop" or any(map(self._is_hopeless, skips)):
            return True
        # A stretch begins where no step before this one was skipped.
        begins = any(
            self._last[name].in_a_row
            == self._last[name].skipped - before[name].skipped
            for name in skips
        )
        if self._action != "blame" or not begins:
            return False
        self._stretches += 1
        number = self._stretches
        return number <= ALL_STRETCHES or number & (number - 1) == 0

    def _is_at_floor(self, name: str) -> bool:
        optimizer = self._optimizers[name]
        floor = optimizer.rule.min_scale
        return not optimizer.dynamic or self._last[name].scale <= floor

    def _is_hopeless(self, name: str) -> bool:
        in_a_row = self._last[name].in_a_row
        return self._is_at_floor(name) and in_a_row >= PATIENCE_AT_FLOOR

    def _raise_if_over(self, where: str, name: str, blame: Blame | None):
        now = self._last[name]
        why = "" if blame is None else f" {blame.message}"
        if self._is_hopeless(name):
            raise LossScaleError(
                f"{where}: {now.in_a_row} steps in a row are not finite, and "
                f"the loss scale is at its floor of {now.scale:g}.{why}"
            )
        if self._action == "stop":
            raise LossScaleError(
                f"{where}: the step was not finite, and on_overflow is "
                f"'stop'.{why}"
            )

    def _log_blame(self, where: str, skips, blame: Blame) -> None:
        name = skips[0]
        text = blame.message
        if blame.at_fault == "scale" and not self._is_at_floor(name):
            text += (
                " That is normal: the scale is dynamic and searches; it is now "
                f"{self._last[name].scale:g}, and nothing is to be done."
            )
        elif blame.at_fault == "scale":
            text += " The scale can come no lower: lower min_scale."
        logging.warning("%s: the step was skipped. %s", where, text)

    def _scale_now(self, name: str, now: _Reading) -> str:
        optimizer = self._optimizers[name]
        of_name = f" of {name}" if self._has_several else ""
        if not optimizer.dynamic:
            return f"the loss scale{of_name} is fixed at {now.scale:g}."
        text = f"the loss scale{of_name} is now {now.scale:g}"
        if now.scale <= optimizer.rule.min_scale:
            return f"{text}, its floor."
        if now.in_a_row > _NORMAL_IN_A_ROW:
            return (
                f"{text}, after {now.in_a_row} in a row; on_overflow='blame' "
                "says why."
            )
        return f"{text}, which is normal now and then: it searches."

    def _tell(self, step, epoch, name, scale, reason, blame=None) -> None:
        optimizer = name if self._has_several else None
        event = ScaleEvent(step, epoch, optimizer, scale, reason, blame)
        for listener in self._listeners:
            listener(event)

    def _read(self) -> dict[str, _Reading]:
        return {
            name: _Reading(
                float(optimizer.dynamic_scale.numpy()),
                int(optimizer.skipped_steps.numpy()),
                int(optimizer.consecutive_skips.numpy()),
            )
            for name, optimizer in self._optimizers.items()
        }

    def _skipped(self) -> dict[str, int]:
        return {name: each.skipped for name, each in self._read().items()}
