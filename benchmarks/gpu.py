"""Everything that only a GPU can show, by one command without a network.

    python -m benchmarks.gpu --output_dir=DIR [--part=PART]
    python -m benchmarks.gpu --rehearse

Step time and memory of ResNet-50 (224 px, batch 128) and a GPT (12 layers,
width 768, 1024 tokens, batch 8) in float32 with and without TF32, bfloat16 and
float16, with XLA and without, against stock Keras, and PyTorch where it is
installed; the same of all recipes; parity of the image recipe; and of several
GPUs how a step scales and how fast NCCL reduces.

Each measurement has a process of its own. A part ends after --minutes; the
same command goes on where it ended. DIR/gpu.json and DIR/gpu.md hold what
there is so far. --rehearse runs every part with tiny sizes on a CPU.
"""

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from benchmarks import gpu_page
from benchmarks.program import run
from tfamp.errors import InputError
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.recipe.flags import check_ranges, flag

SCHEMA = "tfamp.gpu/1"
PARTS = ("steps", "parity", "several", "others", "recipes")
RECIPES = (
    *("image_classification", "language_model", "text_classification"),
    *("segmentation", "line_recognition", "gan", "diffusion", "lora"),
)
# Precisions, and whether float32 products may round to TF32.
KINDS = (
    ("float32", True),
    ("float32", False),
    ("mixed_bfloat16", True),
    ("mixed_float16", True),
)
SEEDS = range(5)
# To trace on a CPU.
_QUICKEST = "language_model"
# No measurement may take all of its part.
_LONGEST_SECONDS = 240.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    output_dir: str = flag("", "folder for gpu.json and gpu.md; kept")
    part: Literal["all", "steps", "parity", "several", "others", "recipes"] = (
        flag("all", "what to measure")
    )
    minutes: float = flag(8.0, "after which a part ends", minimum=0)
    rehearse: bool = flag(False, "tiny sizes, on a CPU; no figures to quote")

    def __post_init__(self):
        check_ranges(self)


def plan(rehearse: bool = False) -> list[dict[str, Any]]:
    """All measurements: what matters most comes first in each part.

    Args:
        rehearse: takes of each kind one, with each value of what varies.
    """
    measurements = list(_measurements())
    if not rehearse:
        return measurements
    seen: set[tuple] = set()
    chosen = []
    for asked in measurements:
        # The same path through the code, but for the numbers.
        path = (asked["part"], asked["kind"], asked.get("contestant"))
        is_slow = asked.get("recipe", _QUICKEST) != _QUICKEST
        if path not in seen and not is_slow:
            seen.add(path)
            chosen.append(asked)
    return chosen


def _measurements() -> Iterator[dict[str, Any]]:
    for case in ("resnet50", "gpt"):
        for precision, tf32 in KINDS:
            for contestant in ("tfamp_xla", "tfamp"):
                yield _train("steps", case, contestant, precision, tf32)
    for seed in SEEDS:
        for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
            yield {
                "part": "parity",
                "kind": "parity",
                "precision": precision,
                "seed": seed,
            }
    for dtype in ("float32", "bfloat16"):
        yield {
            "part": "several",
            "kind": "reduce",
            "dtype": dtype,
            "replicas": 0,
        }
    for precision in ("mixed_bfloat16", "float32"):
        for replicas in (0, 1):
            yield {
                "part": "several",
                "kind": "scaling",
                "precision": precision,
                "replicas": replicas,
            }
    for contestant in ("torch_compile", "keras_xla", "torch", "keras"):
        for case in ("resnet50", "gpt"):
            for precision, tf32 in (KINDS[2], KINDS[0], KINDS[3], KINDS[1]):
                yield _train("others", case, contestant, precision, tf32)
    for name in RECIPES:
        for precision, tf32 in (KINDS[2], KINDS[0], KINDS[3], KINDS[1]):
            for xla in (True, False):
                yield {
                    "part": "recipes",
                    "kind": "recipe",
                    "recipe": name,
                    "precision": precision,
                    "tf32": tf32,
                    "xla": xla,
                }


def _train(part, case, contestant, precision, tf32) -> dict[str, Any]:
    return {
        "part": part,
        "kind": "train",
        "case": case,
        "contestant": contestant,
        "precision": precision,
        "tf32": tf32,
    }


def measure(config: Config) -> dict[str, Any]:
    """Measures what is not yet there, and writes after each measurement.

    Returns:
        What gpu.json holds.

    Raises:
        InputError: no GPU, or a folder that holds other figures.
    """
    if not config.rehearse and not config.output_dir:
        raise InputError(
            "Pass --output_dir=DIR; what is measured is left there."
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = output_folder(config.output_dir or scratch)
        environment = _environment(config.rehearse)
        make_folder(folder)
        record = _begin(folder, environment, config.rehearse)
        for part in PARTS if config.part == "all" else (config.part,):
            _measure_part(config, part, folder, record)
        print(gpu_page.to_markdown(record))
        return record


def _environment(rehearse: bool) -> dict[str, Any]:
    """Of a process of its own: this one leaves the GPU to the others."""
    looked = subprocess.run(
        [sys.executable, "-c", _LOOK],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    environment = json.loads(looked.stdout.strip().splitlines()[-1])
    kind = environment["hardware"]["kind"]
    if kind != "gpu" and not rehearse:
        raise InputError(
            f"benchmarks.gpu needs a GPU, and TensorFlow sees only a {kind} "
            "here; --rehearse runs every part with tiny sizes on a CPU."
        )
    return environment


_LOOK = """
import json
from tfamp.recipe import quiet_tensorflow
quiet_tensorflow()
from tfamp.analysis.page.environment import describe
print(json.dumps(describe(["benchmarks.gpu"])))
"""


def _begin(
    folder: pathlib.Path, environment: dict[str, Any], rehearse: bool
) -> dict[str, Any]:
    """The record that is there, or an empty one."""
    path = folder / "gpu.json"
    record = {
        "schema": SCHEMA,
        "rehearsal": rehearse,
        "environment": environment,
        "measurements": [],
    }
    if not path.exists():
        return record
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        names = there["environment"]["hardware"]["device_names"]
        is_rehearsal = there["rehearsal"]
        there["measurements"] = list(there["measurements"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is no record of benchmarks.gpu; choose another folder."
        ) from None
    if names != environment["hardware"]["device_names"] or (
        is_rehearsal != rehearse
    ):
        raise InputError(
            f"{path} holds figures of {', '.join(names)}"
            f"{', a rehearsal' if is_rehearsal else ''}; choose another folder."
        )
    return there


def _measure_part(
    config: Config, part: str, folder: pathlib.Path, record: dict[str, Any]
) -> None:
    deadline = time.monotonic() + 60 * config.minutes
    tries = collections.Counter(map(_key, record["measurements"]))
    over = {_key(m) for m in record["measurements"] if m["status"] == "done"}
    over |= {
        _key(m) for m in record["measurements"] if m["status"] == "not here"
    }
    wanted = [m for m in plan(config.rehearse) if m["part"] == part]
    left = [m for m in wanted if _key(m) not in over]
    # What failed before comes after what was not yet tried.
    left.sort(key=lambda asked: tries[_key(asked)])
    # One process does for a rehearsal: a start takes longer than the rest.
    size = len(left) if config.rehearse else 1
    for first in range(0, len(left), max(size, 1)):
        if time.monotonic() >= deadline:
            print(f"{part}: {len(left) - first} left for the next call")
            return
        for found in _in_process(
            left[first : first + size], config.rehearse, deadline
        ):
            record["measurements"] = [
                m for m in record["measurements"] if _key(m) != _key(found)
            ] + [found]
            _write(record, folder)
            print(gpu_page.line(found), flush=True)


def _in_process(
    measurements: list[dict[str, Any]], rehearse: bool, deadline: float
) -> list[dict[str, Any]]:
    """What a process of their own found, as long as it may take."""
    seconds = max(deadline - time.monotonic(), 1.0)
    if not rehearse:
        seconds = min(seconds, _LONGEST_SECONDS)
    with tempfile.TemporaryDirectory() as scratch:
        results = pathlib.Path(scratch) / "results"
        results.touch()
        device, size = ("cpu", "tiny") if rehearse else ("gpu", "real")
        command = [
            *(sys.executable, "-m", "tfamp.analysis.jobs.process"),
            *("-m", "benchmarks.gpu_measurements"),
            *(str(results), device, size),
            *map(json.dumps, measurements),
        ]
        with open(pathlib.Path(scratch) / "log", "w+b") as log:
            job = subprocess.Popen(
                command,
                # Its end ends the job, and all that the job has started.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                line = f"its process ended with status {job.wait(seconds)}"
            except subprocess.TimeoutExpired:
                line = f"not done within {seconds:.0f} s"
            finally:
                job.stdin.close()
                job.wait()
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        found = [
            json.loads(text)
            for text in results.read_text(encoding="utf-8").splitlines()
        ]
    there = {_key(each) for each in found}
    last = f": {said[-1][:200]}" if said else ""
    return found + [
        {**asked, "status": "failed", "line": line + last}
        for asked in measurements
        if _key(asked) not in there
    ]


def _key(measurement: dict[str, Any]) -> str:
    """What was asked, whatever was found."""
    asked = (
        *("part", "kind", "case", "contestant", "recipe", "precision"),
        *("tf32", "xla", "seed", "dtype"),
    )
    named = {name: measurement.get(name) for name in asked}
    # Found is how many there were; asked is 0 for all.
    if measurement["kind"] in ("scaling", "reduce"):
        named["one"] = measurement.get("replicas") == 1
    return json.dumps(named, sort_keys=True)


def _write(record: dict[str, Any], folder: pathlib.Path) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / "gpu.json", text)
    write_atomically(folder / "gpu.md", gpu_page.to_markdown(record))


def main(argv: Sequence[str]) -> int:
    """The program: flags in, a page and an exit status out."""
    return run(Config, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
