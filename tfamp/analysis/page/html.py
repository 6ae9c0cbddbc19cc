"""Parts of a report as one HTML file: no request, no other file.

Verdicts come first, then each part's plots, tables and notes, then where it
was measured. `html.css` has the look; `page.js` lets plots tell their numbers
and be saved, and the page lacks nothing else where no script runs.
"""

import base64
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from tfamp.analysis.page.part import Part, Plot, Table

Chapter = tuple[str, Sequence[Part]]

# Told apart by shape and word, not by colour alone.
_MARKS = {
    True: ("good", "✓", "Good"),
    False: ("bad", "✕", "Attention"),
    None: ("neutral", "i", "For information"),
}
_UNDECIDED = ("undecided", "?", "Undecided")

# A table with more rows scrolls in a box of its own on a screen.
_ROWS_AT_ONCE = 16

# Points; a plot that is wider takes a line for itself.
_NARROW_PLOT = 360

# Folders that the heading names.
_NAMED_CHAPTERS = 3

# Characters; a column with more in a cell needs room to wrap well.
_LONG_CELL = 28

# Also a range, or a number with its unit; a dash or nothing where it lacks.
_NUMBER = re.compile(r"|-|[<>~]?\s?[-+\N{MINUS SIGN}]?[\d.].*|not finite")

# The last line of defence for a page that quotes names from anywhere.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
)


def render(chapters: Sequence[Chapter]) -> str:
    """One page.

    Args:
        chapters: the name of each folder, and its parts. A single one gives
            the page its title; of several each gets a heading. One without a
            name is about all folders.

    Returns:
        The HTML text. Every text of the parts is escaped in it; a plot's SVG
        is put there as it is, with ids that are its own.
    """
    style, script = map(_own_file, ("html.css", "page.js"))
    digest = hashlib.sha256(script.encode()).digest()
    policy = _POLICY.format(digest=base64.b64encode(digest).decode())
    title = f"tfamp: {_heading(chapters)}"
    body = "\n".join(_body(chapters))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def _own_file(name: str) -> str:
    path = importlib.resources.files(__package__) / name
    return path.read_text(encoding="utf-8")


def _body(chapters: Sequence[Chapter]) -> Iterator[str]:
    heading = escape(_heading(chapters))
    yield f"<header><p>tfamp report</p><h1>{heading}</h1></header>"
    yield "<main>"
    yield '<section class="verdicts" aria-label="Verdicts">'
    for i, (name, parts) in enumerate(chapters):
        if len(chapters) > 1 and name:
            yield f"<h2>{escape(name)}</h2>"
        yield "<ul>"
        for j, part in enumerate(parts):
            yield _verdict_line(part, f"part-{i}-{j}")
        yield "</ul>"
    yield "</section>"
    num_plots = 0
    for i, (name, parts) in enumerate(chapters):
        for j, part in enumerate(parts):
            titled = _titled(chapters, name, part)
            yield from _section(part, f"part-{i}-{j}", titled, num_plots)
            num_plots += len(part.plots)
    yield from _environment(chapters)
    yield "</main>"


def _heading(chapters: Sequence[Chapter]) -> str:
    """What the page is about: the recipe and what was asked, or the folders."""
    subjects = {part.subject for _, parts in chapters for part in parts} - {""}
    recipes = ", ".join(sorted(subjects))
    if len(chapters) == 1:
        ((name, parts),) = chapters
        asked = ", ".join(part.title.lower() for part in parts)
        return f"{recipes or name}: {asked}"
    folders = [name for name, _ in chapters if name]
    names = ", ".join(folders[:_NAMED_CHAPTERS])
    if len(folders) > _NAMED_CHAPTERS:
        names += f" and {len(folders) - _NAMED_CHAPTERS} more"
    return f"{recipes}: {names}" if recipes else names


def _titled(chapters: Sequence[Chapter], name: str, part: Part) -> str:
    is_one = len(chapters) == 1 or not name
    return part.title if is_one else f"{name}: {part.title}"


def _verdict_line(part: Part, anchor: str) -> str:
    kind, sign, word = _UNDECIDED if part.is_undecided else _MARKS[part.is_good]
    return (
        f'<li class="{kind}"><span class="mark" aria-hidden="true">{sign}'
        f'</span><div><a href="#{anchor}">{escape(part.title)}</a> '
        f'<span class="word">{word}</span>'
        f"<p>{_prose(part.verdict)}</p>{_list(part.remarks)}</div></li>"
    )


def _section(
    part: Part, anchor: str, heading: str, num_plots: int
) -> Iterator[str]:
    yield f'<section id="{anchor}">'
    yield f"<h2>{escape(heading)}</h2>"
    if part.plots:
        yield '<div class="plots">'
        shapes = _shapes(part.plots)
        for i, (plot, shape) in enumerate(zip(part.plots, shapes, strict=True)):
            name = f"{_file_name(heading)}-{i + 1}"
            yield _figure(plot, f"plot-{num_plots + i}", shape, name)
        yield "</div>"
    for table in part.tables:
        yield _table(table)
    yield _list(part.notes)
    yield "</section>"


def _shapes(drawn: Sequence[Plot]) -> list[str]:
    """Narrow plots go in pairs; one that is left over takes a whole line."""
    shapes = [
        "wide" if _points(plot) > _NARROW_PLOT else "narrow" for plot in drawn
    ]
    waiting = None
    for i, shape in enumerate([*shapes, "wide"]):
        if shape == "narrow":
            waiting = i if waiting is None else None
        elif waiting is not None:
            shapes[waiting], waiting = "wide", None
    return shapes


def _points(plot: Plot) -> float:
    width = re.search(r'<svg[^>]*?\bwidth="([\d.]+)pt"', plot.svg)
    return float(width[1]) if width else _NARROW_PLOT + 1


def _figure(plot: Plot, prefix: str, shape: str, name: str) -> str:
    pictures = _picture(plot.svg, plot, prefix, "picture")
    if plot.narrow_svg:
        pictures = _picture(plot.svg, plot, prefix, "picture screen")
        pictures += _picture(
            plot.narrow_svg, plot, f"{prefix}-phone", "picture phone"
        )
    values = ""
    if plot.values:
        text = json.dumps(plot.values, separators=(",", ":"))
        values = f' data-name="{escape(name)}" data-values="{escape(text)}"'
    return (
        f'<figure class="{shape}" style="--natural: {_points(plot):g}pt"'
        f"{values}>{_scrolling(pictures, plot.caption, 'plot')}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _picture(svg: str, plot: Plot, prefix: str, kind: str) -> str:
    # One image with one description, not a hundred pieces of text.
    alternative = escape(plot.alternative)
    described = f'<svg class="{kind}" role="img" aria-label="{alternative}"'
    return with_own_ids(svg, prefix).replace("<svg", described, 1)


def _file_name(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "plot"


def with_own_ids(svg: str, prefix: str) -> str:
    """The SVG with every id, and every reference to one, under a prefix.

    Equal pieces of two plots have equal ids, and in one page the second plot
    would be drawn with the clip paths of the first.

    Args:
        svg: text in which `<` and `>` stand for tags only, as in XML.
        prefix: goes before each id, with a dash.
    """
    reference = re.compile(r'(\bid="|\burl\(#|\bhref="#)')

    def rewrite(tag: re.Match) -> str:
        return reference.sub(rf"\g<1>{prefix}-", tag[0])

    return re.sub(r"<[^>]*>", rewrite, svg)


def _table(table: Table) -> str:
    kinds = [
        _column_kind([row[i] for row in table.rows])
        for i in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    body = "\n".join(_row(row, kinds) for row in table.rows)
    shape = "table long" if len(table.rows) > _ROWS_AT_ONCE else "table"
    html = (
        f"<table><caption><span>{escape(table.caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    )
    return _scrolling(html, table.caption, shape)


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    first, *others = zip(row, kinds, strict=True)
    cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in others)
    return f'<tr><th scope="row"{first[1]}>{escape(first[0])}</th>{cells}</tr>'


def _column_kind(cells: Sequence[str]) -> str:
    if all(map(_NUMBER.fullmatch, cells)):
        return ' class="number"'
    is_prose = any(len(cell) > _LONG_CELL for cell in cells)
    return ' class="prose"' if is_prose else ""


def _scrolling(html: str, label: str, kind: str) -> str:
    """A box that scrolls by itself where the screen is too small."""
    # With the keyboard too, and then a screen reader says what it is.
    return (
        f'<div class="{kind}" role="group" tabindex="0" '
        f'aria-label="{escape(label)}">{html}</div>'
    )


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{_prose(each)}</li>" for each in sentences)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _prose(text: str) -> str:
    """Sentences in which `this` is a command or a name to type."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _environment(chapters: Sequence[Chapter]) -> Iterator[str]:
    measured: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, parts in chapters:
        for part in parts:
            title = _titled(chapters, name, part)
            measured.setdefault(tuple(part.environment), []).append(title)
    measured.pop((), None)
    if not measured:
        return
    yield '<section class="environment"><h2>Environment</h2>'
    for rows, titles in measured.items():
        yield f"<h3>{escape(', '.join(titles))}</h3>{_definitions(rows)}"
    yield "</section>"


def _definitions(rows: Iterable[tuple[str, str]]) -> str:
    pairs = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>"
        for label, text in rows
    )
    return f"<dl>{pairs}</dl>"
