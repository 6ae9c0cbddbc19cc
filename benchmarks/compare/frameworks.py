"""Whether the frameworks are here, and see the device, before all else."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.compare.contestants import CONTESTANTS, Contestant
from tfamp.errors import InputError

# The processes that look are ended after so many seconds.
_LONGEST = 300

# Each prints the GPU that it sees, or nothing.
_LOOK = {
    "TensorFlow": (
        "import tensorflow as tf; "
        "print(*[g.name for g in tf.config.list_physical_devices('GPU')])"
    ),
    "PyTorch": (
        "import torch; "
        "print(*[torch.cuda.get_device_name(0)] * torch.cuda.is_available())"
    ),
}


def check(contestants: Sequence[Contestant], device: str) -> None:
    """Raises InputError where a contestant could not train on the device."""
    torch = [each for each in contestants if each.framework == "torch"]
    others = [each.name for each in contestants if each not in torch]
    without = ",".join(
        others or [c.name for c in CONTESTANTS if c.framework != "torch"]
    )
    if torch and importlib.util.find_spec("torch") is None:
        raise InputError(
            "PyTorch is not installed: pip install 'tfamp[torch]', or leave "
            f"it out with --contestants={without}."
        )
    # PyTorch compiles C++ on a CPU.
    if (
        device == "cpu"
        and any(each.compiled for each in torch)
        and not any(map(shutil.which, ("g++", "c++", "clang++")))
    ):
        raise InputError(
            "torch_compile needs a C++ compiler on a CPU, and there is none; "
            "install g++, or leave it out of --contestants."
        )
    if device == "gpu":
        names = ["TensorFlow"] * bool(others) + ["PyTorch"] * bool(torch)
        blind = [name for name in names if not _gpu_seen_by(name)]
        if blind:
            raise InputError(
                f"device=gpu: {' and '.join(blind)} "
                f"{'sees' if len(blind) == 1 else 'see'} no GPU here; use "
                "--device=cpu."
            )


def _gpu_seen_by(name: str) -> str:
    # In a process of its own: what looks at a GPU also takes memory of it.
    looked = subprocess.run(
        [sys.executable, "-c", _LOOK[name]],
        capture_output=True,
        text=True,
        timeout=_LONGEST,
        check=False,
    )
    return looked.stdout.strip() if looked.returncode == 0 else ""
