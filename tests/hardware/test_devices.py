"""What is detected, and what is recommended for it."""

import ctypes
import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tensorflow as tf

from tfamp.hardware import devices as hardware
from tfamp.hardware.devices import (
    GIB,
    KNOWN_HARDWARE,
    Hardware,
    detect_hardware,
    recommend,
    recommend_strategy,
)
from tfamp.hardware.float8_units import float8_units


def cpu(*flags):
    return Hardware("cpu", ("a CPU",), cpu_bf16=flags)


def gpu(capability, name="a GPU", count=1):
    return Hardware(
        "gpu", (name,) * count, count, compute_capability=capability
    )


@pytest.mark.parametrize(
    ("name", "precision", "loss_scaling", "multiple"),
    [
        ("P100", "float32", "none", 1),
        ("V100", "mixed_float16", "dynamic", 8),
        ("T4", "mixed_float16", "dynamic", 8),
        ("A100", "mixed_bfloat16", "none", 8),
        ("L4", "mixed_bfloat16", "none", 8),
        ("H100", "mixed_bfloat16", "none", 8),
        ("B200", "mixed_bfloat16", "none", 8),
        ("MI300", "mixed_bfloat16", "none", 16),
        ("TPU v5e", "mixed_bfloat16", "none", 128),
        ("TPU v5p", "mixed_bfloat16", "none", 128),
        ("TPU v6e", "mixed_bfloat16", "none", 128),
    ],
)
def test_each_known_device_gets_the_precision_that_suits_it(
    name, precision, loss_scaling, multiple
):
    advice = recommend(KNOWN_HARDWARE[name])
    assert advice.precision == precision
    assert advice.loss_scaling == loss_scaling
    assert advice.dimension_multiple == multiple
    assert advice.reason.endswith(".")
    assert "\n" not in advice.reason


def test_every_known_device_is_judged_above():
    names = ["P100", "V100", "T4", "A100", "L4", "H100", "B200", "MI300"]
    assert set(KNOWN_HARDWARE) == {*names, "TPU v5e", "TPU v5p", "TPU v6e"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("H100", "Tensor Cores multiply E4M3 and E5M2"),
        ("L4", "Tensor Cores multiply E4M3 and E5M2"),
        ("B200", "for each block are not used"),
        ("A100", "from compute capability 8.9 on"),
        ("MI300", "FNUZ"),
        ("TPU v5p", "TPUs up to v6"),
        ("TPU v6e", "TPUs up to v6"),
    ],
)
def test_it_is_said_what_a_device_does_with_8_bits(name, said):
    assert said in float8_units(KNOWN_HARDWARE[name])


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 1), "float32"),
        ((7, 0), "mixed_float16"),
        ((7, 5), "mixed_float16"),
        ((8, 0), "mixed_bfloat16"),
        ((12, 0), "mixed_bfloat16"),
    ],
)
def test_the_borders_lie_at_compute_capability_7_and_8(capability, precision):
    assert recommend(gpu(capability)).precision == precision


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("AMD Instinct MI100", "mixed_bfloat16"),
        ("AMD Instinct MI210", "mixed_bfloat16"),
        ("AMD Instinct MI250X / MI250", "mixed_bfloat16"),
        ("AMD Instinct MI325X", "mixed_bfloat16"),
        ("AMD Radeon Instinct MI60", "float32"),
        ("METAL", "float32"),
    ],
)
def test_a_gpu_without_compute_capability_is_judged_by_name(name, precision):
    assert recommend(gpu(None, name)).precision == precision


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        (("avx512_bf16",), "mixed_bfloat16"),
        (("avx512_bf16", "amx_bf16"), "mixed_bfloat16"),
        (("amx_bf16",), "mixed_bfloat16"),
        (("bf16",), "float32"),
        ((), "float32"),
    ],
)
def test_a_cpu_is_judged_by_its_bfloat16_instructions(flags, precision):
    assert recommend(cpu(*flags)).precision == precision


def test_a_cpu_of_which_nothing_is_known_stays_in_float32_and_says_so():
    advice = recommend(Hardware("cpu", ("a CPU",), cpu_bf16=None))
    assert advice.precision == "float32"
    assert "does not tell" in advice.reason


@pytest.mark.parametrize(
    ("found", "strategy"),
    [
        (cpu(), "one_device"),
        (gpu((8, 0)), "one_device"),
        (gpu((8, 0), count=2), "mirrored"),
        (KNOWN_HARDWARE["TPU v5e"], "tpu"),
    ],
)
def test_the_strategy_follows_the_number_of_devices(found, strategy):
    name, reason = recommend_strategy(found)
    assert name == strategy
    assert reason.endswith(".")


def test_the_known_devices_have_the_published_memory_and_capability():
    published = {
        "P100": (16, (6, 0)),
        "V100": (16, (7, 0)),
        "T4": (16, (7, 5)),
        "A100": (40, (8, 0)),
        "L4": (24, (8, 9)),
        "H100": (80, (9, 0)),
        "B200": (180, (10, 0)),
        "MI300": (192, None),
        "TPU v5e": (16, None),
        "TPU v5p": (95, None),
        "TPU v6e": (32, None),
    }
    assert published == {
        name: (known.memory_bytes // GIB, known.compute_capability)
        for name, known in KNOWN_HARDWARE.items()
    }


def devices(monkeypatch, kind, details):
    """Makes TensorFlow report devices of a kind, with these details."""
    physical = [
        tf.config.PhysicalDevice(f"/physical_device:{kind}:{i}", kind)
        for i in range(len(details))
    ]
    monkeypatch.setattr(
        tf.config,
        "list_physical_devices",
        lambda asked: physical if asked == kind else [],
    )
    monkeypatch.setattr(
        tf.config.experimental,
        "get_device_details",
        lambda device: details[physical.index(device)],
    )


def test_this_machine_is_detected():
    found = detect_hardware()
    assert found.kind in ("cpu", "gpu", "tpu")
    assert found.count == len(found.device_names)
    assert all(found.device_names)
    assert recommend() == recommend(found)
    assert recommend_strategy() == recommend_strategy(found)
    if found.kind == "cpu" and sys.platform == "linux":
        assert found.memory_bytes > GIB / 4


def test_several_gpus_are_judged_by_the_weakest(monkeypatch):
    devices(
        monkeypatch,
        "GPU",
        [
            {"device_name": "NVIDIA A100", "compute_capability": (8, 0)},
            {"device_name": "Tesla V100", "compute_capability": (7, 0)},
        ],
    )
    monkeypatch.setattr(hardware, "_cuda_memory_bytes", lambda count: count)
    found = detect_hardware()
    assert found.kind == "gpu"
    assert found.device_names == ("NVIDIA A100", "Tesla V100")
    assert found.count == 2
    assert found.compute_capability == (7, 0)
    assert found.memory_bytes == 2
    assert recommend(found).precision == "mixed_float16"
    reason = recommend(found).reason
    assert reason.startswith("The weakest of NVIDIA A100, Tesla V100 (compute")


def test_an_amd_gpu_has_no_compute_capability(monkeypatch):
    devices(monkeypatch, "GPU", [{"device_name": "AMD Instinct MI210"}])
    found = detect_hardware()
    assert found.compute_capability is None
    assert recommend(found).precision == "mixed_bfloat16"


def test_one_unknown_gpu_among_known_ones_decides(monkeypatch):
    details = [{"device_name": "AMD Instinct MI210"}, {}]
    devices(monkeypatch, "GPU", details)
    found = detect_hardware()
    assert found.device_names == ("AMD Instinct MI210", "GPU")
    assert recommend(found).precision == "float32"


def test_a_tpu_comes_before_everything_else(monkeypatch):
    devices(monkeypatch, "TPU", [{}, {}])
    found = detect_hardware()
    assert (found.kind, found.count) == ("tpu", 2)
    assert recommend_strategy(found)[0] == "tpu"


X86 = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu {}\nbugs\t\t: none\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        (X86.format("avx512f avx512_bf16 amx_bf16"), "avx512_bf16 amx_bf16"),
        (X86.format("avx512f avx512_vnni"), ""),
        (X86.format("avx512_bf16x"), ""),
        (ARM.format("bf16 i8mm"), "bf16"),
        (ARM.format("svebf16"), ""),
    ],
)
def test_cpu_flags_are_read_as_whole_words(cpuinfo, flags):
    assert hardware._bf16_flags(cpuinfo) == tuple(flags.split())


def test_missing_cpu_information_is_unknown_and_not_none_present(monkeypatch):
    assert hardware._bf16_flags("") is None
    monkeypatch.setattr(hardware.platform, "system", lambda: "Windows")
    assert hardware._cpu_bf16() is None


@pytest.mark.parametrize(("answer", "flags"), [("1", ("bf16",)), ("", ())])
def test_macos_is_asked_by_sysctl(monkeypatch, answer, flags):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(
        hardware, "_sysctl", {"hw.optional.arm.FEAT_BF16": answer}.get
    )
    assert hardware._cpu_bf16() == flags


def fake_driver(sizes, failure=0):
    def get(device, ordinal):
        device._obj.value = ordinal + 10
        return 0

    def total(size, device):
        size._obj.value = sizes[device.value - 10]
        return failure

    return SimpleNamespace(
        cuInit=lambda flags: 0, cuDeviceGet=get, cuDeviceTotalMem_v2=total
    )


def test_gpu_memory_is_the_smallest_of_all(monkeypatch):
    driver = fake_driver([80 * GIB, 40 * GIB])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert hardware._cuda_memory_bytes(2) == 40 * GIB
    assert hardware._cuda_memory_bytes(1) == 80 * GIB


def test_gpu_memory_is_unknown_without_a_driver_that_answers(monkeypatch):
    driver = fake_driver([GIB], failure=101)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert hardware._cuda_memory_bytes(1) is None

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert hardware._cuda_memory_bytes(1) is None


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KNOWN_HARDWARE["T4"].count = 2


def test_importing_the_module_imports_no_tensorflow():
    code = (
        "import sys, tfamp.hardware.devices; print('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
