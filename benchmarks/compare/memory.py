"""Gauges of memory: resident memory of a process, or that of a GPU."""

import contextlib
import ctypes
import pathlib
import sys

from tfamp.analysis.bench.memory import peak_resident_bytes, resident_bytes


class ResidentMemory:
    """Of this process, as Linux counts it; no peak elsewhere.

    The peak is one of the steps alone: tracing and compiling, which may take
    more, come before `begin`.
    """

    _CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")

    def in_use(self) -> int | None:
        """What is resident now."""
        return resident_bytes()

    def begin(self) -> None:
        """Resets the peak of the process."""
        self._can_reset = True
        try:
            # 5: VmHWM begins anew (proc(5)).
            self._CLEAR_REFS.write_text("5")
        except OSError:
            self._can_reset = False

    def peak(self) -> int | None:
        """The most that was resident since `begin`."""
        return peak_resident_bytes() if self._can_reset else None

    def release(self) -> None:
        """Gives freed memory back to the system, where glibc holds it."""
        if sys.platform.startswith("linux"):
            # Not in musl.
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)


class TensorFlowGpuMemory:
    """What TensorFlow has given out on the first GPU."""

    def in_use(self) -> int:
        """What is given out now."""
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["current"]

    def begin(self) -> None:
        """Resets the peak."""
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")

    def peak(self) -> int:
        """The most that was given out since `begin`."""
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]

    def release(self) -> None:
        """Nothing: TensorFlow keeps what it has."""


class TorchGpuMemory:
    """What PyTorch has given out on the first GPU."""

    def in_use(self) -> int:
        """What is given out now."""
        import torch

        return torch.cuda.memory_allocated()

    def begin(self) -> None:
        """Resets the peak."""
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most that was given out since `begin`."""
        import torch

        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        """Gives cached blocks back, for the others' sake."""
        import torch

        torch.cuda.empty_cache()
