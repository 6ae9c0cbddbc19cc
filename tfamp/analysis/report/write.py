"""`report.html`: what was found about a recipe, on one page that opens offline.

The page is made anew from the JSON beside it: `parity.json`, `bench.json`,
`export.json`, `portability.json`, `probe.json`, `tune.json`, and the logs of
a run (`run.json`, `metrics.jsonl`, `scale.jsonl`), whichever lie in the folder.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis.page import environment, html, plots
from tfamp.analysis.page.part import Part
from tfamp.analysis.report import run_logs, run_part, side_by_side
from tfamp.errors import InputError
from tfamp.files.output import make_folder, write_atomically

FILE_NAME = "report.html"

# What reading a record's fields comes to where they are of another kind.
_MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
)


def write(output_dir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into a folder, from the results in it.

    Args:
        output_dir: that a recipe or `tfamp parity`, `bench`, `probe` or `tune`
            wrote.

    Returns:
        The page's path.

    Raises:
        InputError: The folder holds no result, or one that cannot be read.
    """
    folder = pathlib.Path(output_dir).expanduser()
    return write_combined([folder], folder / FILE_NAME)


def write_combined(
    folders: Sequence[str | os.PathLike], path: str | os.PathLike
) -> pathlib.Path:
    """Writes one page about the results in several folders.

    Args:
        folders: each as for `write`; on the page in this order.
        path: of the page; its folder is made.

    Returns:
        The page's path.

    Raises:
        InputError: A folder holds no result, or one that cannot be read; the
            page cannot be written.
    """
    return write_page(chapters_of(folders), path)


def chapters_of(folders: Sequence[str | os.PathLike]) -> list[html.Chapter]:
    """What is reported of folders; of several, first what compares them.

    Raises:
        InputError: as for `write_combined`.
    """
    plots.require_matplotlib()
    named = _named(folders)
    chapters: list[html.Chapter] = [
        (name, parts_in(folder)) for name, folder in named.items()
    ]
    runs = {
        name: run_logs.read(folder)
        for name, folder in named.items()
        if run_logs.is_run(folder)
    }
    compared = [side_by_side.runs_part(runs)] if len(runs) > 1 else []
    tables = side_by_side.tables_part(chapters)
    compared += [tables] if tables else []
    return [("", compared), *chapters] if compared else chapters


def write_page(
    chapters: Sequence[html.Chapter], path: str | os.PathLike
) -> pathlib.Path:
    """Writes chapters as one page.

    Raises:
        InputError: the page cannot be written.
    """
    # Half of a surrogate pair can stand in JSON, but in no file.
    page = html.render(chapters).encode(errors="replace").decode()
    path = pathlib.Path(path).expanduser()
    make_folder(path.parent)
    write_atomically(path, page)
    return path


def parts_in(folder: pathlib.Path) -> list[Part]:
    """What a folder holds to report, the proof before the diagnosis.

    Raises:
        InputError: It holds nothing, or something that cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder.")
    parts = []
    for name, make_part in _ANALYSES.items():
        path = folder / f"{name}.json"
        if path.exists():
            record = _read(path, f"tfamp.{name}/1")
            try:
                part = make_part(record)
                rows = part.environment or environment.rows(record)
            except KeyError as error:
                raise InputError(
                    f"{path} lacks {error}; run its command again."
                ) from error
            except _MALFORMED as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{path} is malformed ({error}); run its command again."
                ) from error
            parts.append(
                dataclasses.replace(
                    part,
                    environment=rows,
                    # Of a file its name; the command has all of its path.
                    subject=str(record.get("recipe", "")).rpartition("/")[2],
                )
            )
    if run_logs.is_run(folder):
        parts.append(_run_part(folder))
    if not parts:
        files = [f"{name}.json" for name in _ANALYSES]
        raise InputError(
            f"{str(folder)!r} holds nothing to report; expected one of "
            f"{', '.join(files)} and {', '.join(run_logs.FILES)}."
        )
    return parts


def _run_part(folder: pathlib.Path) -> Part:
    try:
        return run_part.part(folder)
    except _MALFORMED as error:
        if isinstance(error, InputError):
            raise
        names = [n for n in run_logs.FILES if (folder / n).exists()]
        raise InputError(
            f"{' or '.join(str(folder / name) for name in names)} is malformed "
            f"({error}); move it away."
        ) from error


# A part's module is imported where there is such a part: some need scipy.


def _parity(record: Mapping[str, Any]) -> Part:
    from tfamp.analysis.parity import part as parity_part

    return parity_part.part(record)


def _bench(record: Mapping[str, Any]) -> Part:
    from tfamp.analysis.bench import part as bench_part

    return bench_part.part(record)


def _probe(record: Mapping[str, Any]) -> Part:
    from tfamp.analysis.probe import part as probe_part

    return probe_part.part(record)


def _tune(record: Mapping[str, Any]) -> Part:
    from tfamp.analysis.tune import part as tune_part

    return tune_part.part(record)


def _export(record: Mapping[str, Any]) -> Part:
    from tfamp.analysis.exported import part as export_part

    return export_part.part(record)


def _portability(record: Mapping[str, Any]) -> Part:
    from tfamp.analysis.portability import part as portability_part

    return portability_part.part(record)


_ANALYSES = {
    "parity": _parity,
    "bench": _bench,
    "export": _export,
    "portability": _portability,
    "probe": _probe,
    "tune": _tune,
}


def _named(folders):
    """The folders by a name that tells them apart: the end of the path."""
    paths = [pathlib.Path(f).expanduser().absolute() for f in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise InputError("A folder is named twice; name each once.")


def _read(path: pathlib.Path, schema: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}); remove it, or run its "
            "command again."
        ) from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != schema:
        raise InputError(
            f"{path} has schema {found!r}; this version reads {schema!r}."
        )
    return record
