"""All audits that need no hardware, of all recipes: one page.

    python -m benchmarks.audits --output_dir=DIR

For each recipe and precision, at small sizes: (a) whether the training step
has a kernel for GPUs for every operation, and what the host reads of it; (b)
what XLA makes of its forward and backward pass for a GPU; (c) the same,
compiled for a TPU v5e, where `pip install '.[audit]'` was done. Nothing of it
is run. DIR/audits.json and DIR/audits.md hold what there is so far; the same
command goes on where it ended.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from benchmarks import audit, compiled
from benchmarks.program import check_known, run
from tfamp.errors import InputError
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.recipe.flags import check_ranges, flag

SCHEMA = "tfamp.audits/1"
AUDITS = ("kernels", "gpu", "tpu")
# TPUs have no float16, and tfamp refuses it there.
ON_TPUS = ("float32", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    output_dir: str = flag("", "folder for audits.json and audits.md; kept")
    recipes: tuple[str, ...] = flag(audit.RECIPES, "which to look at")
    precisions: tuple[str, ...] = flag(audit.PRECISIONS, "in which")
    audits: tuple[str, ...] = flag(AUDITS, "of kernels, gpu, tpu")
    python: str = flag(
        sys.executable, "that has jax and libtpu, where it is not this one"
    )

    def __post_init__(self):
        check_ranges(self)
        check_known(self.recipes, audit.RECIPES)
        check_known(self.precisions, audit.PRECISIONS)
        check_known(self.audits, AUDITS)


def measure(config: Config) -> dict[str, Any]:
    """Looks at what was not yet looked at, and writes after each recipe.

    Returns:
        What audits.json holds.
    """
    if not config.output_dir:
        raise InputError("Pass --output_dir=DIR; what is found is left there.")
    folder = output_folder(config.output_dir)
    make_folder(folder)
    record = _begin(folder / "audits.json")
    for name in config.recipes:
        for precision in config.precisions:
            row = record["recipes"].setdefault(f"{name} {precision}", {})
            wanted = [each for each in config.audits if each not in row]
            if precision not in ON_TPUS:
                wanted = [each for each in wanted if each != "tpu"]
            if wanted:
                keras.backend.clear_session()
                row |= _audited(name, precision, wanted, folder, config.python)
                record["versions"] = _versions()
                write_atomically(
                    folder / "audits.json", json.dumps(record, indent=1) + "\n"
                )
                write_atomically(folder / "audits.md", to_markdown(record))
                print(_cells(name, precision, row), flush=True)
    return record


def falls_short(precision: str, row: dict[str, Any]) -> list[str]:
    """What must not be there, in words."""
    found = []
    if row.get("kernels", {}).get("missing"):
        found.append("no kernel for GPUs")
    for kind in ("gpu", "tpu"):
        part = row.get(kind, {})
        if part.get("host"):
            found.append(f"{kind}: calls the host")
        if part.get("error"):
            found.append(f"{kind}: does not compile")
        heads = row.get("gpu", {}).get("heads", [])
        is_wide = compiled.beyond_heads(part.get("wide", []), heads)
        if is_wide and precision != "float32":
            found.append(f"{kind}: a float32 product")
    return found


def to_markdown(record: dict[str, Any]) -> str:
    """The page of a record."""
    versions = dict(record["versions"])
    for row in record["recipes"].values():
        if "versions" in row.get("tpu", {}):
            versions["TPU compiler"] = row["tpu"]["versions"]
    lines = [
        "# What can be asked without a GPU or a TPU",
        "",
        "`python -m benchmarks.audits --output_dir=DIR`: "
        + ", ".join(f"{name} {each}" for name, each in versions.items())
        + ". Batches of 8, one block where a recipe has several. **Compiled, "
        "not run: no GPU and no TPU was at hand.**",
        "",
        "Kernels: operations of the training step; those that run on the host, "
        "no kernel for GPUs being there; values that a GPU makes and the host "
        "reads, in the step's graph. GPU: of the forward and backward pass, as "
        "XLA has it for a GPU: operations, matrix products and convolutions by "
        "the dtypes of their operands, conversions, calls of the host. TPU "
        "v5e: the same pass compiled for one core: products, 10^9 "
        "floating-point operations, MB of weights and batch, of temporaries in "
        "main memory (what fits into the 128 MiB beside the core is not "
        "there), and of code. What falls short: an operation without a kernel, "
        "a call of the host, a float32 product in 16 bits that is of no head "
        "whose result is not bounded, which multiplies in float32 by decision.",
        "",
        "| recipe | precision | kernels | on the host | host reads | GPU | "
        "products | converts | host | TPU v5e: products | 10^9 | MB in | "
        "MB temporary | MB code | falls short |",
        "|" + "---|" * 15,
    ]
    for key, row in record["recipes"].items():
        lines.append(_cells(*key.split(), row))
    return "\n".join(lines) + "\n"


def _begin(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {"schema": SCHEMA, "versions": _versions(), "recipes": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_mine = record["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError):
        is_mine = False
    if not is_mine:
        raise InputError(
            f"{path} is no record of benchmarks.audits; choose another folder."
        )
    return record


def _versions() -> dict[str, str]:
    return {"TensorFlow": tf.__version__, "Keras": keras.__version__}


def _audited(
    name: str,
    precision: str,
    wanted: Sequence[str],
    folder: pathlib.Path,
    python: str,
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if "kernels" in wanted:
        count, host, missing, reads = audit.audit(name, precision)
        row["kernels"] = {
            "operations": count,
            "on_host": [f"{each.type} {each.dtypes}" for each in host],
            "missing": [f"{each.type} {each.dtypes}" for each in missing],
            "host_reads": reads,
        }
    kept = folder / f"{name}-{precision}.hlo"
    if "gpu" in wanted or ("tpu" in wanted and not kept.exists()):
        keras.backend.clear_session()
        passes = compiled.passes_of(name, precision)
        row["gpu"] = dataclasses.asdict(compiled.read(passes.hlo()))
        row["gpu"]["heads"] = passes.heads
        kept.write_bytes(passes.hlo("hlo_serialized"))
    if "tpu" in wanted:
        (row["tpu"],) = for_tpu([kept], python)
        if "No module named" in row["tpu"].get("error", ""):
            print(f"no TPU: {row.pop('tpu')['error']}; see [audit]")
    return row


def for_tpu(
    files: Sequence[pathlib.Path], python: str = sys.executable
) -> Iterator[dict[str, Any]]:
    """What `benchmarks.tpu` finds, in a process that has no TensorFlow."""
    done = subprocess.run(
        [python, "-m", "benchmarks.tpu", *map(str, files)],
        cwd=pathlib.Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    for i, _ in enumerate(files):
        found = json.loads(lines[i]) if i < len(lines) else {}
        found.pop("file", None)
        yield found or {"error": f"ended with status {done.returncode}"}


def _cells(name: str, precision: str, row: dict[str, Any]) -> str:
    cells = [name, precision]
    part = row.get("kernels")
    cells += ["", "", ""]
    if part is not None:
        host = [*part["on_host"], *part["missing"]]
        cells[2:] = [
            str(part["operations"]),
            ", ".join(sorted({each.split()[0] for each in host})) or "-",
            str(len(part["host_reads"])),
        ]
    part = row.get("gpu")
    cells += ["", "", "", ""]
    if part is not None:
        cells[5:] = [
            str(part["operations"]),
            _products(part["products"]),
            str(part["converts"]),
            ", ".join(part["host"]) or "-",
        ]
    part = row.get("tpu")
    cells += ["", "", "", "", ""]
    if part is not None and "error" in part:
        cells[9] = f"does not compile: {part['error'][:100]}"
    elif part is not None:
        cells[9:] = [
            _products(part["products"]),
            f"{part['operations'] / 1e9:.2f}",
            f"{part['argument_bytes'] / 1e6:.1f}",
            f"{part['temporary_bytes'] / 1e6:.1f}",
            f"{part['code_bytes'] / 1e6:.1f}",
        ]
    cells.append(", ".join(falls_short(precision, row)) or "-")
    return f"| {' | '.join(cells)} |"


def _products(products: dict[str, int]) -> str:
    return ", ".join(f"{n} {dtypes}" for dtypes, n in products.items())


def main(argv: Sequence[str]) -> int:
    """The program: flags in, a page and an exit status out."""
    return run(Config, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
