"""Which devices are here, and which precision and strategy suit them.

TensorFlow is imported only by the functions that ask it for devices, and
none of them creates a device: memory and streams stay untouched.
"""

import ctypes
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30

# What Linux calls the instructions in /proc/cpuinfo: on x86 `avx512_bf16` and
# `amx_bf16`, on ARM `bf16`. All three multiply bfloat16 pairs and accumulate
# in float32.
_CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Hardware:
    """The devices that a computation would run on.

    Attributes:
        kind: `tpu` where there is one, else `gpu`, else `cpu`.
        device_names: The model of each device, in TensorFlow's order.
        count: How many devices of this kind there are; a CPU counts as one,
            however many cores it has.
        compute_capability: Of an NVIDIA GPU, `(major, minor)`; the lowest of
            several; None elsewhere.
        cpu_bf16: The bfloat16 instructions of the CPU, of `avx512_bf16`,
            `amx_bf16` and `bf16` (ARM); None where the operating system does
            not tell.
        memory_bytes: Memory of one device, the smallest of several; of a CPU,
            the machine's memory. None where nothing tells.
    """

    kind: Literal["cpu", "gpu", "tpu"]
    device_names: tuple[str, ...]
    count: int = 1
    compute_capability: tuple[int, int] | None = None
    cpu_bf16: tuple[str, ...] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Recommendation:
    """The precision that suits a device.

    Attributes:
        precision: `float32`, `mixed_bfloat16` or `mixed_float16`.
        loss_scaling: `dynamic` or `none`.
        reason: Why, in a sentence.
        dimension_multiple: Layer widths and batch sizes that are multiples of
            it fill the device's matrix units in this precision; 1 where it
            makes no difference.
    """

    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"]
    loss_scaling: Literal["dynamic", "none"]
    reason: str
    dimension_multiple: int = 1


def _gpu(name: str, memory_gib: int, capability: tuple[int, int] | None):
    return Hardware(
        kind="gpu",
        device_names=(name,),
        compute_capability=capability,
        memory_bytes=memory_gib * GIB,
    )


# Devices to ask about without having one. Compute capability from NVIDIA's
# list of CUDA GPUs, memory from the vendors' data sheets; memory chips come
# in binary sizes, so that their "GB" is 2**30 bytes. Where a device is sold
# with several sizes, the name says which.
KNOWN_HARDWARE: dict[str, Hardware] = {
    "P100": _gpu("Tesla P100-PCIE-16GB", 16, (6, 0)),
    "V100": _gpu("Tesla V100-SXM2-16GB", 16, (7, 0)),
    "T4": _gpu("Tesla T4", 16, (7, 5)),
    "A100": _gpu("NVIDIA A100-SXM4-40GB", 40, (8, 0)),
    "L4": _gpu("NVIDIA L4", 24, (8, 9)),
    "H100": _gpu("NVIDIA H100 80GB HBM3", 80, (9, 0)),
    "B200": _gpu("NVIDIA B200", 180, (10, 0)),
    "MI300": _gpu("AMD Instinct MI300X", 192, None),
    "TPU v5e": Hardware("tpu", ("TPU v5e",), memory_bytes=16 * GIB),
    "TPU v5p": Hardware("tpu", ("TPU v5p",), memory_bytes=95 * GIB),
    "TPU v6e": Hardware("tpu", ("TPU v6e",), memory_bytes=32 * GIB),
}


def detect_hardware() -> Hardware:
    """Asks TensorFlow and the operating system what is here.

    Returns:
        The accelerators that TensorFlow sees on this host, else the CPU.
        TPUs that a cluster resolver must first connect to are not among them.
    """
    import tensorflow as tf

    tpus = tf.config.list_physical_devices("TPU")
    if tpus:
        names = tuple("TPU" for _ in tpus)
        return Hardware("tpu", names, len(tpus), cpu_bf16=_cpu_bf16())
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return _detect_gpus(
            [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        )
    return Hardware(
        kind="cpu",
        device_names=(_cpu_name(),),
        cpu_bf16=_cpu_bf16(),
        memory_bytes=_host_memory_bytes(),
    )


def recommend(hardware: Hardware | None = None) -> Recommendation:
    """The precision that trains fastest on this hardware without harm.

    Args:
        hardware: What to judge; detected if None.

    Returns:
        The precision, whether it needs loss scaling, and the reason.
    """
    hardware = detect_hardware() if hardware is None else hardware
    if hardware.kind == "tpu":
        return Recommendation(
            "mixed_bfloat16",
            "none",
            "A TPU multiplies matrices in bfloat16, which has the exponent "
            "range of float32, so gradients need no loss scaling.",
            # A matrix unit is 128 by 128; XLA pads what is smaller.
            dimension_multiple=128,
        )
    if hardware.kind == "gpu":
        return _recommend_for_gpu(hardware)
    return _recommend_for_cpu(hardware)


def recommend_strategy(hardware: Hardware | None = None) -> tuple[str, str]:
    """The strategy for the devices of one host.

    Args:
        hardware: What to judge; detected if None.

    Returns:
        The name for `tfamp.get_strategy`, and the reason in a sentence.
    """
    hardware = detect_hardware() if hardware is None else hardware
    if hardware.kind == "tpu":
        return "tpu", "TPU cores train only under TPUStrategy."
    if hardware.kind == "gpu" and hardware.count > 1:
        return "mirrored", (
            f"{hardware.count} GPUs on one host each train on a share of the "
            "batch and sum their gradients."
        )
    device = "One GPU" if hardware.kind == "gpu" else "A CPU"
    return "one_device", f"{device} has nothing to share the batch with."


def _recommend_for_gpu(hardware: Hardware) -> Recommendation:
    names = list(dict.fromkeys(hardware.device_names))
    name = ", ".join(names)
    if len(names) > 1:
        name = f"The weakest of {name}"
    capability = hardware.compute_capability
    if capability is None:
        return _recommend_by_name(name, names)
    version = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if capability >= (8, 0):
        return Recommendation(
            "mixed_bfloat16",
            "none",
            f"{version} multiplies bfloat16 on Tensor Cores, and bfloat16 has "
            "the exponent range of float32, so gradients need no loss scaling.",
            # 16 bytes: the alignment for which cuBLAS and cuDNN choose their
            # fast Tensor Core kernels.
            dimension_multiple=8,
        )
    if capability >= (7, 0):
        return Recommendation(
            "mixed_float16",
            "dynamic",
            f"{version} has Tensor Cores for float16 but not for bfloat16, "
            "and small gradients underflow in float16 unless the loss is "
            "scaled.",
            dimension_multiple=8,
        )
    return Recommendation(
        "float32",
        "none",
        f"{version} has no Tensor Cores, which came with 7.0: products in 16 "
        "bits that accumulate in float32 gain no speed.",
    )


def _recommend_by_name(name: str, names: list[str]) -> Recommendation:
    # Instinct MI100 and later have matrix cores; MI6 to MI60 have none.
    if all(re.search(r"\bMI[1-9]\d\d", each) for each in names):
        return Recommendation(
            "mixed_bfloat16",
            "none",
            f"{name} multiplies bfloat16 on matrix cores, and bfloat16 has the "
            "exponent range of float32, so gradients need no loss scaling.",
            # The matrix instructions work on tiles of 16 by 16 and 32 by 32.
            dimension_multiple=16,
        )
    return Recommendation(
        "float32",
        "none",
        f"{name} reports no compute capability and is no AMD Instinct MI100 "
        "or later, so nothing is known of its 16-bit matrix units.",
    )


def _recommend_for_cpu(hardware: Hardware) -> Recommendation:
    flags = hardware.cpu_bf16
    found = [f for f in ("amx_bf16", "avx512_bf16") if f in (flags or ())]
    if found:
        return Recommendation(
            "mixed_bfloat16",
            "none",
            f"The CPU multiplies bfloat16 with {' and '.join(found)}; large "
            "models gain speed, small ones gain nothing over float32.",
            # One AVX-512 register or AMX tile row: 16 float32 sums.
            dimension_multiple=16,
        )
    if flags is None:
        reason = (
            "This operating system does not tell whether the CPU has bfloat16 "
            "instructions, and without them 16 bits are slower."
        )
    elif flags:
        reason = (
            "The CPU has the ARM bf16 instructions, but no speed-up of "
            "bfloat16 training with TensorFlow is established on them."
        )
    else:
        reason = (
            "The CPU has neither AVX512-BF16 nor AMX, and without them 16 "
            "bits are slower than float32."
        )
    return Recommendation("float32", "none", reason)


def _detect_gpus(details: list[dict]) -> Hardware:
    capabilities = [d.get("compute_capability") for d in details]
    # One program runs on all of them: what the weakest lacks, none may use.
    known = [each for each in capabilities if each is not None]
    lowest = min(known) if len(known) == len(capabilities) else None
    return Hardware(
        kind="gpu",
        device_names=tuple(d.get("device_name", "GPU") for d in details),
        count=len(details),
        compute_capability=lowest,
        cpu_bf16=_cpu_bf16(),
        memory_bytes=_cuda_memory_bytes(len(details)),
    )


def _cuda_memory_bytes(count: int) -> int | None:
    """The smallest total memory of the visible CUDA devices.

    TensorFlow tells the memory in use, not what there is. The driver does,
    without a context on the device.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    sizes = []
    for ordinal in range(count):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        )
        if failed:
            return None
        sizes.append(size.value)
    return min(sizes)


def _cpu_name() -> str:
    if platform.system() == "Linux":
        match = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
        if match:
            return match[1].strip()
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _cpu_bf16() -> tuple[str, ...] | None:
    system = platform.system()
    if system == "Linux":
        return _bf16_flags(_read("/proc/cpuinfo"))
    if system == "Darwin":
        # Apple sold no Intel machine with AVX512-BF16.
        has_bf16 = _sysctl("hw.optional.arm.FEAT_BF16") == "1"
        return ("bf16",) if has_bf16 else ()
    return None


def _bf16_flags(cpuinfo: str) -> tuple[str, ...] | None:
    # x86 lists its instructions as `flags`, ARM as `Features`.
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    if match is None:
        return None
    present = match[1].split()
    return tuple(flag for flag in _CPU_BF16_FLAGS if flag in present)


def _host_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    done = subprocess.run(
        ["sysctl", "-n", name], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
