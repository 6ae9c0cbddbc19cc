"""Where figures come from: device, versions, command, time.

`describe` goes into an analysis' JSON as `environment`; `rows` is what a
reader sees of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.files import command_line
from tfamp.files.output import utc_now
from tfamp.hardware.doctor import diagnose


def describe(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What stands beside a measurement, ready for JSON.

    Args:
        argv: program and arguments; those of this process if None.

    Returns:
        `command` (as a shell takes it), `time` (UTC, ISO 8601), `hardware`
        (as `tfamp.detect_hardware` has it) and `versions` (None for what is
        not installed).
    """
    found = diagnose()
    return {
        "command": command_line.written(argv),
        "time": utc_now(),
        "hardware": found["hardware"],
        "versions": found["versions"],
    }


def rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what a record says of its environment.

    Args:
        record: with `environment`, as `describe` makes it, or with any of its
            fields at the top, as `run.json` has them.
    """
    found = {**record, **(record.get("environment") or {})}
    labelled = [
        ("command", found.get("command")),
        ("time", _day_and_minute(found.get("time") or found.get("start_time"))),
        ("device", _device(found.get("hardware"))),
        ("strategy", _strategy(found)),
        ("versions", _versions(found.get("versions"))),
        ("source", _commit(found.get("git"))),
    ]
    return [(label, text) for label, text in labelled if text]


def _day_and_minute(time):
    return f"{time[:10]} {time[11:16]} UTC" if time else None


def _device(hardware):
    if not hardware:
        return None
    names = ", ".join(dict.fromkeys(hardware["device_names"]))
    count = hardware.get("count", 1)
    text = f"{count} x {names}" if count > 1 else names
    text = f"{hardware['kind'].upper()}: {text}"
    if hardware.get("compute_capability"):
        version = ".".join(map(str, hardware["compute_capability"]))
        text += f", compute capability {version}"
    if hardware.get("cpu_bf16"):
        text += f", {', '.join(hardware['cpu_bf16'])}"
    if hardware.get("memory_bytes"):
        text += f", {hardware['memory_bytes'] / 2**30:.1f} GiB"
    return text


def _strategy(found):
    if not found.get("strategy") or not found.get("replicas"):
        return None
    plural = "s" if found["replicas"] > 1 else ""
    return f"{found['strategy']}, {found['replicas']} replica{plural}"


def _versions(versions):
    known = {k: v for k, v in (versions or {}).items() if v}
    return ", ".join(f"{name} {known[name]}" for name in known)


def _commit(git):
    if not git or not git.get("commit"):
        return None
    changed = ", with changes" if git.get("dirty") else ""
    return f"commit {git['commit'][:12]}{changed}"
