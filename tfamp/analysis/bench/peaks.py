"""Published peaks of devices: the vendors' figures, not measured ones.

Dense matrix products, without sparsity, of one GPU or one TPU chip. Sources:
NVIDIA's data sheets of the V100, T4, A10G, A100, L4, H100, H200 and of the HGX
B200 (an eighth of it); Google Cloud's pages on each TPU version.
"""

import dataclasses
import re

# 10**12 operations a second.
_TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak rates of one device, in 10**12 operations a second.

    Attributes:
        float32: on the ordinary units; None where the vendor names none.
        tf32: float32 products rounded to TF32 on the matrix units; None
            where there are none that do.
        float16: on the matrix units; None where there are none that do.
        bfloat16: the same.
    """

    float32: float | None
    tf32: float | None
    float16: float | None
    bfloat16: float | None


# A pattern of the name that TensorFlow gives a device -> its peaks. The first
# one that is found counts.
_PEAKS = {
    r"V100.*PCIE": Peak(14.0, None, 112.0, None),
    r"V100": Peak(15.7, None, 125.0, None),
    r"\bT4\b": Peak(8.1, None, 65.0, None),
    r"\bA10G\b": Peak(31.5, 35.0, 70.0, 70.0),
    r"\bA100\b": Peak(19.5, 156.0, 312.0, 312.0),
    r"\bL4\b": Peak(30.3, 60.0, 121.0, 121.0),
    r"\bH100 PCIe\b": Peak(51.0, 378.0, 756.0, 756.0),
    r"\bH(100|200) NVL\b": Peak(60.0, 417.5, 835.5, 835.5),
    r"\bH(100|200)\b": Peak(67.0, 494.5, 989.5, 989.5),
    r"\bB200\b": Peak(75.0, 1125.0, 2250.0, 2250.0),
    r"\bTPU v2\b": Peak(None, None, None, 45.0),
    r"\bTPU v3\b": Peak(None, None, None, 123.0),
    r"\bTPU v4\b": Peak(None, None, None, 275.0),
    r"\bTPU v5 ?(e|lite)": Peak(None, None, None, 197.0),
    r"\bTPU v5p?\b": Peak(None, None, None, 459.0),
    r"\bTPU v6 ?(e|lite)": Peak(None, None, None, 918.0),
}


def published_peak(
    device_name: str, precision: str, tf32: bool
) -> float | None:
    """Operations a second that a device reaches at most, as its vendor says.

    Args:
        device_name: as `tfamp.detect_hardware` gives it.
        precision: "float32", "mixed_bfloat16" or "mixed_float16"; of
            "float8", products and all else, no vendor gives one figure.
        tf32: whether float32 products may be rounded to TF32, where the
            device does that.

    Returns:
        None where the vendor's figure is not known here.
    """
    for pattern, peak in _PEAKS.items():
        if re.search(pattern, device_name, re.IGNORECASE):
            rate = getattr(peak, precision.removeprefix("mixed_"), None)
            if precision == "float32" and tf32 and peak.tf32:
                rate = peak.tf32
            return rate and rate * _TERA
    return None
