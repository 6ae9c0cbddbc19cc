"""`tfamp doctor`: devices, versions, advice, known failures."""

import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Group

from tfamp.errors import InputError, did_you_mean
from tfamp.files import console
from tfamp.files.standard_error import caught, said_at_start
from tfamp.hardware.devices import (
    KNOWN_HARDWARE,
    Hardware,
    detect_hardware,
    recommend,
    recommend_strategy,
)
from tfamp.hardware.float8_units import float8_units
from tfamp.hardware.known_issues import known_issues
from tfamp.version import __version__

SCHEMA = "tfamp.doctor/1"

_PACKAGES = ("keras", "numpy", "ml_dtypes", "tensorflow-datasets")


def diagnose(assume: str | None = None) -> dict[str, Any]:
    """Examines this machine, or a device that it does not have.

    Args:
        assume: A name of `KNOWN_HARDWARE`, in any case and with or without
            blanks and dashes; None to detect what is here.

    Returns:
        The report, ready for JSON: `schema`, `assumed`, `hardware`,
        `versions` (None for what is not installed), `recommendation`,
        `float8` (what the device does with it), `strategy`, `known_issues`,
        and `tensorflow_messages`, what TensorFlow said about accelerators
        while it looked for them.

    Raises:
        InputError: The name is unknown, or TensorFlow does not import.
    """
    found = None if assume is None else known_hardware(assume)
    with caught() as log:
        try:
            import tensorflow as tf
        except ImportError as error:
            raise InputError(
                f"TensorFlow does not import here ({error}); install it anew: "
                "pip install --force-reinstall tensorflow."
            ) from error
        found = found or detect_hardware()
    build = tf.sysconfig.get_build_info()
    versions = {
        "tfamp": __version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        **{package: _installed(package) for package in _PACKAGES},
        "cuda_build": build.get("cuda_version"),
        "cudnn_build": build.get("cudnn_version"),
    }
    strategy, strategy_reason = recommend_strategy(found)
    return {
        "schema": SCHEMA,
        "assumed": assume is not None,
        "hardware": dataclasses.asdict(found),
        "versions": versions,
        "recommendation": dataclasses.asdict(recommend(found)),
        "float8": float8_units(found),
        "strategy": {"name": strategy, "reason": strategy_reason},
        "known_issues": known_issues(found, versions, build),
        "tensorflow_messages": _about_accelerators(
            "".join([said_at_start(), *log])
        ),
    }


def report_sections(report: Mapping[str, Any]) -> list[Group]:
    """The report of `diagnose` for people, a section for each topic."""
    advice, strategy = report["recommendation"], report["strategy"]
    issues = report["known_issues"]
    return [
        console.section(
            "Hardware (assumed, not this machine)"
            if report["assumed"]
            else "Hardware",
            _hardware_rows(report),
        ),
        console.section(
            "Recommended",
            [
                ("precision", advice["precision"]),
                ("", advice["reason"]),
                ("loss scaling", advice["loss_scaling"]),
                *_dimension_rows(advice["dimension_multiple"]),
                ("float8", report["float8"]),
                ("strategy", strategy["name"]),
                ("", strategy["reason"]),
            ],
        ),
        console.section(
            "Versions",
            [
                (name, version or "not installed")
                for name, version in report["versions"].items()
                if version or name not in ("cuda_build", "cudnn_build")
            ],
        ),
        console.section(
            "Known trouble with these versions",
            [
                row
                for issue in issues
                for row in (
                    (f"{issue['package']} {issue['version']}", issue["what"]),
                    ("", issue["fix"]),
                )
            ]
            or [("nothing", "")],
        ),
    ]


def _hardware_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = report["hardware"]
    names = list(dict.fromkeys(found["device_names"]))
    times = f"{found['count']} x " if found["count"] > 1 else ""
    rows = [("kind", found["kind"]), ("device", times + ", ".join(names))]
    if found["compute_capability"]:
        version = ".".join(map(str, found["compute_capability"]))
        rows.append(("compute capability", version))
    memory = found["memory_bytes"]
    rows.append(
        ("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown")
    )
    if not report["assumed"]:
        flags = found["cpu_bf16"]
        known = "unknown on this system" if flags is None else "none"
        rows.append(("CPU bfloat16", ", ".join(flags or ()) or known))
    if found["kind"] == "cpu":
        for i, message in enumerate(report["tensorflow_messages"]):
            rows.append(("" if i else "TensorFlow says", message))
        rows.append(
            ("", "`tfamp doctor --assume=A100` judges a device not here.")
        )
    return rows


def _dimension_rows(multiple: int) -> list[tuple[str, str]]:
    if multiple == 1:
        return []
    return [
        ("dimensions", f"multiples of {multiple} fill the matrix units"),
    ]


def known_hardware(name: str) -> Hardware:
    """A device of `KNOWN_HARDWARE`, in any case and with or without blanks.

    Raises:
        InputError: there is none of that name.
    """

    def plain(text):
        return re.sub(r"[\s_-]", "", text).casefold()

    for known, found in KNOWN_HARDWARE.items():
        if plain(known) == plain(name):
            return found
    raise InputError(
        f"Unknown hardware {name!r}; expected one of "
        f"{', '.join(KNOWN_HARDWARE)}.{did_you_mean(name, KNOWN_HARDWARE)}"
    )


def _installed(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _about_accelerators(log: str) -> list[str]:
    messages = [
        line.split("] ", 1)[1].strip()
        for line in log.splitlines()
        if "] " in line
    ]
    relevant = re.compile(r"cuda|gpu|dlopen|rocm|tpu", re.IGNORECASE)
    return list(dict.fromkeys(m for m in messages if relevant.search(m)))
