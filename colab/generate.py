"""Makes the notebooks: colab/NAME.ipynb of colab/NAME.py.

    python -m colab.generate            # writes all
    python -m colab.generate --check    # exit status 1, and names, if stale
    python -m colab.generate --run      # runs those that show their outputs

A source is in jupytext's percent format. It begins with a markdown cell: the
title, and a line each for what one will see, how long it takes and which
runtime to choose, as `_FACTS` has them. Badge, setup cell and metadata are
added here, so that all notebooks have the same. The setup cell fetches and runs
`setup_runtime.py`, which is made of `first_cell.py`.
"""

import configparser
import pathlib
import re
import sys
import textwrap
from collections.abc import Sequence

import jupytext
import nbformat
from packaging.requirements import Requirement

# Where Colab finds the notebooks, and the setup cell the source. A fork
# changes it here.
REPOSITORY = "tfamp/tfamp"
BRANCH = "main"

FOLDER = pathlib.Path(__file__).parent
FIRST_CELL = FOLDER / "first_cell.py"
SETUP_NAME = "setup_runtime.py"
# What the page of the repository shows as it ran; the others have no outputs.
WITH_OUTPUTS: tuple[str, ...] = ("find_the_nan", "number_formats")
# How a line of tfamp's begins.
_LOG = "WARNING:absl:epoch "
_NOT_NOTEBOOKS = ("first_cell", "generate", "setup_runtime")
_EMPTY = 'SOURCE, TENSORFLOW, OTHERS = "", "", ""'

_FACTS = ("What you will see", "How long it takes", "Which runtime")
# What Colab writes into a notebook for its runtime types.
_RUNTIMES = {
    "CPU": {},
    "GPU": {"accelerator": "GPU", "gpuType": "T4"},
    "TPU": {"accelerator": "TPU", "gpuType": "V5E1"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes all notebooks; `--check` only compares, `--run` runs some.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status: 1 where `--check` found one that is stale, 2 for
        another argument.
    """
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) not in ([], ["--check"], ["--run"]):
        print(
            f"{' '.join(argv)}: expected --check, --run or nothing",
            file=sys.stderr,
        )
        return 2
    stale = stale_notebooks()
    if list(argv) == ["--check"]:
        for path in stale:
            print(f"stale: colab/{path.name}; run python -m colab.generate")
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote colab/{path.name}")
    if list(argv) == ["--run"]:
        for name in WITH_OUTPUTS:
            path = FOLDER / f"{name}.ipynb"
            path.write_text(ran(path), encoding="utf-8")
            print(f"ran colab/{path.name}")
    return 0


def sources() -> list[pathlib.Path]:
    """The notebooks as they are written: `colab/*.py`, two apart."""
    return sorted(
        path for path in FOLDER.glob("*.py") if path.stem not in _NOT_NOTEBOOKS
    )


def stale_notebooks() -> dict[pathlib.Path, str]:
    """The files that are not as they should be, and what they should.

    The outputs of a notebook that shows some are left out of that.
    """
    texts = {
        source.with_suffix(".ipynb"): notebook_text(source)
        for source in sources()
    }
    texts[FOLDER / SETUP_NAME] = first_cell() + "\n"
    return {
        path: text for path, text in texts.items() if _without(path) != text
    }


def ran(path: pathlib.Path) -> str:
    """A notebook with the outputs of a run here, in its folder.

    Of what comes on stderr only what tfamp logs is kept.
    """
    import nbclient

    notebook = nbformat.read(path, as_version=4)
    done = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        done,
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell, made in zip(notebook.cells, done.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = made.execution_count
            cell.outputs = _whole(made.outputs)
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4) + "\n"


def _whole(
    outputs: Sequence[nbformat.NotebookNode],
) -> list[nbformat.NotebookNode]:
    """Outputs with what is printed in one piece, and only our log on stderr."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(
                line for line in lines if line.startswith(_LOG)
            )
            if not output.text:
                continue
        before = kept[-1] if kept else {}
        if "name" in output and before.get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def notebook_text(source: pathlib.Path) -> str:
    """The notebook as the JSON of its file.

    Raises:
        ValueError: the first cell lacks the title, or one of the facts.
    """
    title, *cells = jupytext.read(source).cells
    runtime = _runtime(source, title)
    title.source = f"{_badge(source.stem)}\n\n{title.source}"
    cells = [title, nbformat.v4.new_code_cell(setup_cell()), *cells]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i:02}"
        cell.metadata = {}
    accelerator, gpu_type = (
        {key: _RUNTIMES[runtime][key]} if _RUNTIMES[runtime] else {}
        for key in ("accelerator", "gpuType")
    )
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            **accelerator,
            "colab": {**gpu_type, "provenance": []},
            "kernelspec": {"display_name": "Python 3", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4) + "\n"


def setup_cell() -> str:
    """The first cell of code: it gets the setup, if it is not here, and runs it.

    Jupyter starts a notebook in its folder, where it is; Colab elsewhere.
    """
    address = "https://raw.githubusercontent.com"
    return (
        f"![ -f {SETUP_NAME} ] || curl -sO "
        f"{address}/{REPOSITORY}/{BRANCH}/colab/{SETUP_NAME}\n"
        f"%run {SETUP_NAME}"
    )


def first_cell() -> str:
    """The setup, with the repository and the versions in it."""
    setup = configparser.ConfigParser()
    setup.read(FOLDER.parent / "setup.cfg")
    extras = setup["options.extras_require"]
    needed = [
        *_requirements(setup["options"]["install_requires"]),
        *_requirements(extras["recipes"]),
        *_requirements(extras["report"]),
    ]
    tensorflow = next(r for r in needed if r.name == "tensorflow")
    others = " ".join(str(r) for r in needed if r is not tensorflow)
    # Readers see it: in lines that they can read.
    lines = textwrap.wrap(others, 70, break_on_hyphens=False)
    literals = "".join(f'    "{line} "\n' for line in lines)
    text = FIRST_CELL.read_text(encoding="utf-8").rstrip("\n")
    return text.replace(
        _EMPTY,
        f'SOURCE = "https://github.com/{REPOSITORY}"\n'
        f'TENSORFLOW = "{_versions(tensorflow)}"\n'
        f"OTHERS = (\n{literals})",
    )


def _without(path: pathlib.Path) -> str | None:
    """A file's text, of a notebook that shows outputs without these."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if path.stem not in WITH_OUTPUTS:
        return text
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook, version=4) + "\n"


def _requirements(lines: str) -> list[Requirement]:
    return [
        Requirement(line)
        for line in lines.splitlines()
        if line and not line.startswith("#")
    ]


def _versions(requirement: Requirement) -> str:
    """The versions with the lower bound first, as people write them."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def _badge(name: str) -> str:
    site = "https://colab.research.google.com"
    return (
        f"[![Open in Colab]({site}/assets/colab-badge.svg)]"
        f"({site}/github/{REPOSITORY}/blob/{BRANCH}/colab/{name}.ipynb)"
    )


def _runtime(source: pathlib.Path, title: nbformat.NotebookNode) -> str:
    """The runtime that the title cell says to choose."""
    facts = {
        fact: re.search(rf"^- \*\*{fact}:\*\* (\w+)", title.source, re.M)
        for fact in _FACTS
    }
    absent = [fact for fact, found in facts.items() if not found]
    if absent or title.cell_type != "markdown" or title.source[:2] != "# ":
        raise ValueError(
            f"{source.name} must begin with a markdown cell: a title, and a "
            f'line "- **FACT:** ..." for each of {", ".join(_FACTS)}.'
        )
    runtime = facts["Which runtime"][1]
    if runtime not in _RUNTIMES:
        raise ValueError(
            f"{source.name}: after **Which runtime:** must come one of "
            f"{', '.join(_RUNTIMES)}, not {runtime!r}."
        )
    return runtime


if __name__ == "__main__":
    sys.exit(main())
