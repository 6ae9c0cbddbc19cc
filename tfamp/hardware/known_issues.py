"""What is known to fail with which versions, on which hardware."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from tfamp.hardware.devices import Hardware


@dataclass(frozen=True)
class KnownIssue:
    """Something that fails with certain versions, and what to do about it.

    Attributes:
        package: The package whose versions matter.
        versions: Its versions on which the failure was seen, as a PEP 440
            specifier; later ones may be sound and are not accused.
        what: What fails, and how.
        fix: What to do about it.
        applies: Whether it concerns this hardware here.
    """

    package: str
    versions: str
    what: str
    fix: str
    applies: Callable[[Hardware], bool] = lambda hardware: True


# What the tests ran on, as PEP 440 specifiers; `.ci/versions` runs them.
TRIED = {
    "python": ">=3.10,<3.14",
    "tensorflow": ">=2.19,<2.22",
    "keras": ">=3.10,<3.16",
}


def _several_replicas(hardware: Hardware) -> bool:
    # A CPU can be cut into logical devices, one GPU cannot be shared so.
    return hardware.count > 1 or hardware.kind == "cpu"


def _multiplies_bfloat16_in_avx512(hardware: Hardware) -> bool:
    return hardware.kind == "cpu" and "avx512_bf16" in (hardware.cpu_bf16 or ())


# What `tfamp.recipe.hints` says where it has happened.
ADAPT = KnownIssue(
    "keras",
    "==3.15.*",
    "Normalization().adapt(dataset) fails under mixed_float16 and "
    "mixed_bfloat16; adapt(array) rounds mean and variance to 16 bits.",
    'Make it in float32: keras.layers.Normalization(dtype="float32").',
)

KNOWN_ISSUES = (
    ADAPT,
    KnownIssue(
        "keras",
        "==3.15.*",
        "LossScaleOptimizer on several replicas: it looks at the gradients of "
        "the first replica only, before they are summed, so an overflow on "
        "another one writes inf into the weights, and hangs a job of several "
        "workers.",
        "Use tfamp.wrap_optimizer.",
    ),
    KnownIssue(
        "keras",
        "==3.15.*",
        "LossScaleOptimizer has no limits: in a long run of overflows the "
        "scale reaches 0, in a long run without one inf.",
        "Use tfamp.wrap_optimizer.",
    ),
    KnownIssue(
        "keras",
        "==3.15.*",
        "Model.compile(auto_scale_loss=True) scales the loss only under the "
        "policy named mixed_float16; a DTypePolicyMap or per-layer policies "
        "train unscaled, without a word.",
        "Use tfamp.wrap_optimizer and auto_scale_loss=False.",
    ),
    KnownIssue(
        "keras",
        "==3.15.*",
        "Model.fit under MultiWorkerMirroredStrategy fails at once, in every "
        "precision.",
        "Use tfamp.fit.",
    ),
    KnownIssue(
        "keras",
        "==3.15.*",
        "Model.fit under MirroredStrategy fails with steps_per_execution above "
        "1, with gradient_accumulation_steps and with ema_overwrite_frequency.",
        "Use tfamp.fit.",
        _several_replicas,
    ),
    KnownIssue(
        "keras",
        "==3.15.*",
        "Model.fit under MirroredStrategy clips the gradients of each replica "
        "and not their sum: global_clipnorm=1 lets a norm of 2 through on two "
        "replicas.",
        "Use tfamp.fit with tfamp.wrap_optimizer.",
        _several_replicas,
    ),
    KnownIssue(
        "keras",
        "==3.15.*",
        "Model.fit under MirroredStrategy with jit_compile=True fails on CPU "
        "devices.",
        "Use tfamp.fit, or jit_compile=False.",
        lambda hardware: hardware.kind == "cpu",
    ),
    KnownIssue(
        "keras",
        ">=3.10,<3.13",
        "Muon fails on TensorFlow at its first step: 'ResourceVariable' object "
        "has no attribute 'path'.",
        "Run pip install 'keras>=3.13', or use AdamW.",
    ),
    KnownIssue(
        "tensorflow",
        "==2.21.*",
        "Kernels on CPUs add in the 16 bits of their tensors: gradients of "
        "biases and of gathered rows, segment, scatter and cumulative sums "
        "stall at 256 in bfloat16, at 2048 in float16.",
        "Use tfamp.fit, which makes these sums in float32.",
        lambda hardware: hardware.kind == "cpu",
    ),
    KnownIssue(
        "tensorflow",
        ">=2.19,<2.21",
        "With XLA, CPUs round float32 to 8 bits by way of float16: one number "
        "in 300 is not the nearest.",
        "Run pip install 'tensorflow>=2.21', or jit=False.",
        lambda hardware: hardware.kind == "cpu",
    ),
    KnownIssue(
        "tensorflow",
        "==2.21.*",
        "On this CPU a depthwise convolution in bfloat16 whose kernel is 15 or "
        "more wide (all of DepthwiseConv1D's are as wide as they are long) can "
        "hang in its first call.",
        "Set ONEDNN_MAX_CPU_ISA=AVX512_CORE in the environment, or keep these "
        "layers in float32.",
        _multiplies_bfloat16_in_avx512,
    ),
    KnownIssue(
        "tensorflow-datasets",
        "==4.9.10",
        "tfds.load fails with ModuleNotFoundError: it needs "
        "importlib_resources and does not install it.",
        "Run pip install importlib_resources.",
        lambda hardware: not importlib.util.find_spec("importlib_resources"),
    ),
    KnownIssue(
        "tensorflow",
        "==2.21.*",
        "tensorflow-tpu, the TensorFlow that drives a Cloud TPU, was released "
        "up to 2.20.0 only when tfamp was tested.",
        "Use a TPU virtual machine whose TensorFlow already sees the TPU.",
        lambda hardware: hardware.kind == "tpu",
    ),
)


def known_issues(
    hardware: Hardware,
    versions: dict[str, str | None],
    build: Mapping[str, Any],
) -> list[dict[str, str]]:
    """The failures to expect of these versions on this hardware.

    Args:
        hardware: Where the program would run.
        versions: Package name to installed version, None if absent.
        build: How TensorFlow was built, as `tf.sysconfig.get_build_info`
            tells it.

    Returns:
        A record each: `package`, `version`, `what`, `fix`.
    """
    issues = [
        issue
        for issue in KNOWN_ISSUES
        if (version := versions.get(issue.package)) is not None
        and SpecifierSet(issue.versions).contains(version, prereleases=True)
        and issue.applies(hardware)
    ]
    issues += _build_issues(hardware, build)
    issues += _never_tried(versions)
    return [
        {
            "package": issue.package,
            "version": versions[issue.package] or "",
            "what": issue.what,
            "fix": issue.fix,
        }
        for issue in issues
    ]


def _never_tried(versions: Mapping[str, str | None]) -> list[KnownIssue]:
    return [
        KnownIssue(
            package,
            "",
            f"tfamp was never tried with this version, only with {specifier}.",
            f"Install one of those: pip install '{package}{specifier}'."
            if package != "python"
            else "Use one of those.",
        )
        for package, specifier in TRIED.items()
        if (version := versions.get(package)) is not None
        and not SpecifierSet(specifier).contains(version, prereleases=True)
    ]


def _build_issues(
    hardware: Hardware, build: Mapping[str, Any]
) -> list[KnownIssue]:
    is_amd = hardware.device_names[0].startswith("AMD")
    if hardware.kind == "gpu" and is_amd and not build.get("is_rocm_build"):
        return [
            KnownIssue(
                "tensorflow",
                "",
                "This build does not drive AMD GPUs.",
                "Install the build that AMD maintains, tensorflow-rocm.",
            )
        ]
    architectures = build.get("cuda_compute_capabilities", [])
    if hardware.compute_capability is None or not architectures:
        return []
    # A build for sm_80 or compute_80 holds machine code for 8.0, which runs
    # on the same major version from that minor version on.
    major, minor = hardware.compute_capability
    for architecture in architectures:
        match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)", architecture)
        if match and int(match[1]) == major and int(match[2]) <= minor:
            return []
    return [
        KnownIssue(
            "tensorflow",
            "",
            "This build holds no machine code for compute capability "
            f"{major}.{minor}, but {', '.join(architectures)}: the driver "
            "compiles the kernels at the first start, which TensorFlow warns "
            "can take 30 minutes or longer.",
            "Expect one long start; the driver caches what it compiled.",
        )
    ]
