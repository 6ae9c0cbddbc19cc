"""Several folders on one page: over each other, and in one table."""

import json

import pytest

from tests.analysis.report.test_run import epoch, leave
from tfamp import cli
from tfamp.analysis.page.part import Part, Table
from tfamp.analysis.report import run_logs, side_by_side, write


def logs_of(folder, config, *epochs, precision="float32"):
    folder.mkdir()
    record = {
        "exit_reason": "finished",
        "recipe": "recipes.digits",
        "precision": precision,
        "config": {"output_dir": str(folder), **config},
    }
    leave(folder, record=record, epochs=epochs)
    return folder


def two_runs(tmp_path):
    one = logs_of(
        tmp_path / "one",
        {"seed": 0, "learning_rate": 0.1},
        epoch(0, 2.0, val_accuracy=0.5),
        epoch(1, 1.0, val_accuracy=0.75, learning_rate=0.01),
    )
    other = logs_of(
        tmp_path / "other",
        {"seed": 0, "learning_rate": 0.2},
        epoch(0, 3.0, val_accuracy=0.25),
        precision="mixed_float16",
    )
    return one, other


def test_runs_are_drawn_over_each_other_a_plot_for_each_metric(tmp_path):
    folders = two_runs(tmp_path)
    runs = {each.name: run_logs.read(each) for each in folders}
    plots = {
        p.caption.split()[0]: p for p in side_by_side.runs_part(runs).plots
    }
    assert list(plots) == [
        *("loss", "val_accuracy", "learning_rate", "examples_per_second"),
    ]
    (panel,) = plots["loss"].values["panels"]
    curves = {each["label"]: each["y"] for each in panel["series"]}
    assert curves == {"one": [2.0, 1.0], "other": [3.0]}


def test_one_table_compares_the_ends_and_remarks_the_settings(tmp_path):
    folders = two_runs(tmp_path)
    runs = {each.name: run_logs.read(each) for each in folders}
    part = side_by_side.runs_part(runs)
    (table,) = part.tables
    first, second = (
        dict(zip(table.columns, row, strict=True)) for row in table.rows
    )
    assert (first["run"], first["epochs"], first["loss"]) == (
        *("one", "2", "1.0000"),
    )
    assert (second["precision"], second["val accuracy"]) == (
        *("mixed_float16", "0.2500"),
    )
    assert second["learning rate"] == "-"
    assert part.remarks == ["learning_rate: 0.1 in one, 0.2 in other."]
    assert "The best val_accuracy at the end is 0.7500, of one." in part.verdict


def test_the_page_begins_with_the_comparison_and_is_headed_by_the_recipe(
    tmp_path,
):
    path = write.write_combined(two_runs(tmp_path), tmp_path / "all.html")
    page = path.read_text()
    assert "<h1>recipes.digits: one, other</h1>" in page
    assert page.index("Runs side by side") < page.index("one: Training run")


def test_a_loss_alone_is_judged_as_smaller_is_better(tmp_path):
    folders = [
        logs_of(tmp_path / name, {}, epoch(0, loss))
        for name, loss in (("a", 2.0), ("b", 1.0))
    ]
    runs = {each.name: run_logs.read(each) for each in folders}
    assert "The best loss at the end is 1.0000, of b." in (
        side_by_side.runs_part(runs).verdict
    )


def test_a_run_without_a_finite_end_takes_no_part_in_the_verdict(tmp_path):
    folders = [
        logs_of(tmp_path / name, {}, epoch(0, loss))
        for name, loss in (("a", None), ("b", 1.0), ("c", None))
    ]
    runs = {each.name: run_logs.read(each) for each in folders}
    part = side_by_side.runs_part(runs)
    assert part.verdict.startswith("3 runs; no metric")
    assert part.tables[0].rows[0][3] == "not finite"


def test_analyses_of_one_kind_share_a_table():
    def chapter(name, title, value, columns=("precision", "ms")):
        rows = [("float32", value)]
        return (name, [Part(title, "V", tables=[Table("c", columns, rows)])])

    alike = [chapter("a", "Speed", "1"), chapter("b", "Speed", "2")]
    part = side_by_side.tables_part([*alike, chapter("c", "Parity", "3")])
    (table,) = part.tables
    assert table.columns == ("folder", "precision", "ms")
    assert table.rows == [("a", "float32", "1"), ("b", "float32", "2")]
    other = chapter("b", "Speed", "2", columns=("precision", "s"))
    assert side_by_side.tables_part([alike[0], other]) is None
    assert side_by_side.tables_part(alike[:1]) is None


@pytest.mark.slow
def test_the_command_prints_what_the_page_says_as_json(tmp_path, capsys):
    one, other = map(str, two_runs(tmp_path))
    page = tmp_path / "all.html"
    argv = ["report", one, other, f"--output={page}", "--json"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["path"]) == ("tfamp.report/1", str(page))
    assert [(p["folder"], p["title"]) for p in report["parts"]] == [
        ("", "Runs side by side"),
        ("one", "Training run"),
        ("other", "Training run"),
    ]
    assert report["parts"][1]["is_good"] is True
