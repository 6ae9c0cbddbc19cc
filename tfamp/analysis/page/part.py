"""What a report is made of: parts with a verdict, plots, tables and notes.

Each analysis turns its JSON into a `Part`; `report` puts parts on a page.
Nothing here needs matplotlib.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        svg: the `<svg>` element.
        caption: what is to be seen, in a sentence or two.
        alternative: for who cannot see it: the same finding in words.
        narrow_svg: the same for a phone; "" where it only has to shrink.
        values: what is drawn, as numbers: `panels` (see
            `tfamp.analysis.page.values`), and where they lie in the two
            pictures, `boxes` and `narrow_boxes`.
    """

    svg: str
    caption: str
    alternative: str
    narrow_svg: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures in rows.

    Attributes:
        caption: what the rows are.
        columns: the headings, units included; the first one names the rows.
        rows: cells as text, in the columns' order.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One analysis on the page.

    Attributes:
        title: such as "Parity".
        verdict: the finding, in one or two sentences.
        is_good: whether the finding is what one hopes for; None where there
            is nothing to judge.
        is_undecided: it is not, but only since there is too little to tell.
        subject: the recipe that it is about.
        remarks: its details and what takes from it, a sentence or two each;
            they stand with the verdict.
        plots: pictures, the most telling first.
        tables: figures.
        notes: sentences on how it was measured, and what is to be doubted.
        environment: label and text of what it ran on; `environment.rows`
            makes them, and `report` fills them in.
    """

    title: str
    verdict: str
    is_good: bool | None = None
    is_undecided: bool = False
    subject: str = ""
    remarks: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    environment: Sequence[tuple[str, str]] = ()
