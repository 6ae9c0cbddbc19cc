"""What a device makes of products of 8-bit numbers.

Of the vendors' documents, not measured: the numbers of `tfamp.float8` are the
same on every device.
"""

import re

from tfamp.hardware.devices import Hardware

_ALIKE = "training in float8 gives its numbers, in bfloat16 products"


def float8_units(hardware: Hardware) -> str:
    """Whether a device multiplies 8-bit numbers, in a sentence.

    Args:
        hardware: as `tfamp.detect_hardware` gives it.
    """
    names = " ".join(hardware.device_names)
    if hardware.kind == "tpu":
        return (
            "TPUs up to v6 multiply bfloat16 and int8, and no 8-bit floating-"
            f"point numbers: {_ALIKE}, without a gain in speed."
        )
    if hardware.kind == "cpu":
        return f"CPUs do not multiply them: {_ALIKE}, more slowly than without."
    capability = hardware.compute_capability
    if capability is not None and capability >= (8, 9):
        more = (
            " Its formats with a scale for each block are not used."
            if capability >= (10, 0)
            else ""
        )
        return (
            "Tensor Cores multiply E4M3 and E5M2; products become such where "
            f"XLA compiles them (jit, on by default on GPUs).{more}"
        )
    if re.search(r"\bMI3[0-2]\d", names):
        return (
            "Its matrix cores multiply formats of their own (FNUZ, E4M3 up to "
            f"240), not those of tfamp.float8: {_ALIKE}, without a gain in "
            "speed."
        )
    return (
        f"No units for them are known: {_ALIKE}, more slowly than without; "
        "NVIDIA GPUs have them from compute capability 8.9 on."
    )
