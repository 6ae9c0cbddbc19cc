"""What the commands print: text for people, JSON for programs."""

import contextlib
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

# Fits beside a sidebar.
_NOTEBOOK_COLUMNS = 100

# Between two columns of a table.
_GAP = 2
# A longer name in a table may be folded, to as little as this.
_FOLDED = 24


def section(heading: str, rows: Sequence[tuple[str, str]]) -> Group:
    """A heading over rows of a label and a text."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(f"  {label}", text)
    return Group(Text(heading, style="bold"), grid)


def table(*headings: str, title: str | None = None) -> Table:
    """An empty table; figures at the right, `format` and `kind` at the left."""
    # Two blanks between columns, none at the edge: five formats fit 80 columns.
    frame = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for heading in headings:
        is_text = heading in ("format", "kind")
        frame.add_column(heading, justify="left" if is_text else "right")
    return frame


def filled(figures: Any) -> Table:
    """A table of a report as text; its first column at the left.

    Args:
        figures: with `caption`, `columns` and `rows` of text, as a
            `tfamp.analysis.page.part.Table` has them.
    """
    frame = table(*figures.columns, title=figures.caption)
    frame.columns[0].justify = "left"
    for row in figures.rows:
        frame.add_row(*row)
    return frame


def print_text(*blocks: RenderableType) -> None:
    """Prints blocks with a blank line between; to a pipe without colours."""
    # A pipe has no width: nothing wraps there, so that a line stays a line. A
    # notebook would fold long lines anywhere, and tables with them.
    width = None if sys.stdout.isatty() else 1000
    if Console().is_jupyter:
        width = _NOTEBOOK_COLUMNS
    console = Console(
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        # It would show HTML of its own, and leave nothing to be printed.
        force_jupyter=False,
    )
    with console.capture() as capture:
        for block in blocks:
            if isinstance(block, Table):
                block = _fitted(block, console.width)
            console.print(block)
            console.print()
    lines = capture.get().splitlines()
    print("\n".join(line.rstrip() for line in lines).strip("\n"), flush=True)


@contextlib.contextmanager
def aside(is_json: bool):
    """What is printed on the way goes to stderr where stdout is for JSON."""
    if not is_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(report: Mapping[str, Any]) -> None:
    """Prints strict JSON to stdout; inf and nan as strings."""
    print(
        json.dumps(_json_value(report), indent=2, allow_nan=False), flush=True
    )


def print_report(
    is_json: bool, record: Mapping[str, Any], *blocks: RenderableType
) -> None:
    """Prints the record for programs, or the blocks for people."""
    if is_json:
        print_json(record)
    else:
        print_text(*blocks)


def _json_value(value: Any) -> Any:
    # JSON has no inf and nan: they become strings, which `float` reads.
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _fitted(frame: Table, room: int) -> RenderableType:
    """The table with the columns there is room for; no number is cut.

    rich would shorten all columns alike, `0.0012` to `0.0...`. Here the last
    ones go, and their headings are said.
    """
    least = list(map(_least_width, frame.columns))
    natural = list(map(_natural_width, frame.columns))
    if sum(natural) + _GAP * (len(natural) - 1) <= room:
        return frame
    count = len(least)
    while count > 1 and sum(least[:count]) + _GAP * (count - 1) > room:
        count -= 1
    widths = least[:count]
    spare = room - sum(widths) - _GAP * (count - 1)
    for i in range(count):
        more = max(0, min(spare, natural[i] - widths[i]))
        widths[i] += more
        spare -= more
    kept = copy.copy(frame)
    kept.columns = [
        dataclasses.replace(column, width=width, overflow="fold")
        for column, width in zip(frame.columns, widths, strict=False)
    ]
    left_out = [str(column.header) for column in frame.columns[count:]]
    if not left_out:
        return kept
    note = f"Too narrow here for: {', '.join(left_out)}."
    return Group(kept, Text(note, style="dim"))


def _texts(column) -> list[str]:
    return [str(cell) for cell in column.cells]


def _natural_width(column) -> int:
    return max(map(len, [str(column.header), *_texts(column)]))


def _least_width(column) -> int:
    """That of its longest number or word; headings break between words."""
    words = str(column.header).split()
    for text in _texts(column):
        is_number = any(map(str.isdigit, text)) and len(text) <= _FOLDED
        words += [text] if is_number else text.split()
    longest = max(map(len, words), default=0)
    # A path has no blanks, and may be longer than any terminal.
    return min(longest, _FOLDED)
