"""How much memory training takes: of a GPU, or of the process on a CPU."""

import os
import pathlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorflow as tf


def peak_bytes(strategy: "tf.distribute.Strategy") -> int | None:
    """The most that was in use at once since the process began.

    Returns:
        Bytes that TensorFlow had given out on a GPU, the fullest of several;
        on a CPU the peak of the process's resident memory. None where neither
        is to be had, as on a TPU.
    """
    # Here: who asks for the memory of a process need not have TensorFlow in it.
    import tensorflow as tf

    from tfamp.distribute.strategy import devices_of

    devices = [tf.DeviceSpec.from_string(name) for name in devices_of(strategy)]
    if any(device.device_type == "TPU" for device in devices):
        return None
    gpus = [d.device_index for d in devices if d.device_type == "GPU"]
    if not gpus:
        return peak_resident_bytes()
    return max(
        tf.config.experimental.get_memory_info(f"GPU:{index}")["peak"]
        for index in gpus
    )


def resident_bytes() -> int | None:
    """What the process has in memory now; None elsewhere than on Linux."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int | None:
    """The most that the process has had in memory; None on Windows."""
    # Not `ru_maxrss` on Linux: it begins with what the starter of this
    # process had.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
