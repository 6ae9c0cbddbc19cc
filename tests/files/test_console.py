"""What fits a terminal, and what does not, is said."""

import io

import pytest
from rich.console import Console

from tfamp.analysis.page.part import Table
from tfamp.files import console

SPEED = Table(
    "Speed",
    ("precision", "step, ms", "lowest to highest", "examples/s", "time / f32"),
    [
        ("float32", "12.345", "12.1 to 13.4", "5,123,456", "1.000"),
        ("mixed_bfloat16", "10.987", "10.1 to 11.4", "6,123,456", "0.8842"),
    ],
)


def shown(table, width):
    text = io.StringIO()
    fitted = console._fitted(console.filled(table), width)
    Console(file=text, width=width).print(fitted)
    return text.getvalue()


@pytest.mark.parametrize("width", range(30, 121, 5))
def test_a_narrow_terminal_loses_columns_and_never_digits(width):
    text = shown(SPEED, width)
    assert max(map(len, text.splitlines())) <= width
    assert "mixed_bfloat16" in text
    assert "..." not in text
    assert "\u2026" not in text
    for i, heading in enumerate(SPEED.columns):
        said = " ".join(text.partition("Too narrow here for:")[2].split())
        is_left_out = heading in said
        assert all((row[i] in text) != is_left_out for row in SPEED.rows)


def test_a_table_that_fits_is_as_it_was():
    table = console.filled(SPEED)
    assert console._fitted(table, 120) is table


def test_a_path_longer_than_the_terminal_is_folded_and_whole():
    path = "encoder/block_3/attention/query/kernel/of/a/deep/model"
    text = shown(Table("c", ("layer", "error"), [(path, "0.125")]), 40)
    assert max(map(len, text.splitlines())) <= 40
    assert "0.125" in text
    folded = "".join(line[:33].strip() for line in text.splitlines())
    assert path in folded.replace("0.125", "")


def test_what_is_said_on_the_way_leaves_stdout_to_json(capsys):
    for is_json in (True, False):
        with console.aside(is_json):
            print("measuring")
    out, err = capsys.readouterr()
    assert (out, err) == ("measuring\n", "measuring\n")
