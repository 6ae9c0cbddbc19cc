"""`report.html` out of the results in a folder, and what is wrong with them."""

import json

import jsonschema
import pytest

from tests.conftest import ROOT
from tfamp import cli
from tfamp.analysis.page import environment
from tfamp.analysis.page.part import Part
from tfamp.analysis.report import write
from tfamp.errors import InputError


@pytest.fixture
def stub_parts(monkeypatch):
    """Each analysis becomes a part that says what it was given."""

    def stub(name):
        return lambda record: Part(name, f"{name} of {record['recipe']}")

    analyses = {name: stub(name) for name in ("parity", "bench", "probe")}
    monkeypatch.setattr(write, "_ANALYSES", analyses)


def leave(folder, name, **fields):
    folder.mkdir(exist_ok=True, parents=True)
    record = {"schema": f"tfamp.{name}/1", "recipe": folder.name, **fields}
    (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def leave_run(folder):
    folder.mkdir(exist_ok=True, parents=True)
    line = json.dumps({"epoch": 0, "loss": 0.5})
    (folder / "metrics.jsonl").write_text(f"{line}\n")
    return folder


def test_a_folder_gives_one_page_with_all_that_is_there(tmp_path, stub_parts):
    folder = leave_run(leave(leave(tmp_path, "probe"), "parity"))
    path = write.write(folder)
    assert path == folder / "report.html"
    page = path.read_text()
    places = [
        page.index(text) for text in ("parity of", "probe of", "loss 0.5")
    ]
    assert places == sorted(places)
    assert "bench of" not in page


def test_a_run_alone_is_enough(tmp_path):
    page = write.write(leave_run(tmp_path)).read_text()
    assert "loss 0.5000" in page


def test_several_folders_come_in_the_order_they_were_named(
    tmp_path, stub_parts
):
    folders = [leave(tmp_path / name, "bench") for name in ("b", "a")]
    path = write.write_combined(folders, tmp_path / "new" / "all.html")
    page = path.read_text()
    assert page.index("bench of b") < page.index("bench of a")


def test_folders_of_one_name_are_told_apart_by_their_parents(
    tmp_path, stub_parts
):
    folders = [leave(tmp_path / name / "out", "bench") for name in "ab"]
    page = write.write_combined(folders, tmp_path / "all.html").read_text()
    assert "<h2>a/out</h2>" in page
    assert "<h2>b/out</h2>" in page


def test_environment_comes_from_the_record_where_the_part_has_none(
    tmp_path, stub_parts
):
    folder = leave(tmp_path, "bench", environment={"command": "tfamp bench x"})
    assert "<dd>tfamp bench x</dd>" in write.write(folder).read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "has schema None"),
        ('{"schema": "tfamp.bench/2"}', "schema 'tfamp.bench/2'; this version"),
        ('{"schema": "tfamp.bench/1"}', "lacks 'recipe'"),
    ],
)
def test_a_result_that_cannot_be_read_is_one_line_and_keeps_the_old_page(
    tmp_path, stub_parts, text, message
):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(InputError, match=message):
        write.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_folder_without_results_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r"nothing to report.*parity\.json"):
        write.write(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        write.write(tmp_path / "none")


def test_the_same_folder_twice_is_turned_down(tmp_path, stub_parts):
    folder = leave(tmp_path, "bench")
    with pytest.raises(InputError, match="twice"):
        write.write_combined([folder, folder], tmp_path / "all.html")


def test_the_command_writes_where_it_says(
    tmp_path, stub_parts, capsys, monkeypatch
):
    one, other = (leave(tmp_path / name, "bench") for name in ("one", "other"))
    assert cli.main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"Wrote {one / 'report.html'}\n"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(one), str(other)]) == 0
    assert (tmp_path / "report.html").exists()
    assert cli.main(["report", str(one), "--output=page.html"]) == 0
    assert (tmp_path / "page.html").exists()


def test_the_command_turns_down_a_bad_folder_in_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tfamp: ")
    assert error.count("\n") == 1


def test_environment_says_command_device_and_versions(monkeypatch):
    found = {
        "hardware": {
            "kind": "gpu",
            "device_names": ["NVIDIA H100", "NVIDIA H100"],
            "count": 2,
            "compute_capability": [9, 0],
            "cpu_bf16": None,
            "memory_bytes": 80 * 2**30,
        },
        "versions": {"keras": "3.15.1", "cuda_build": None},
    }
    monkeypatch.setattr(environment, "diagnose", lambda: found)
    record = environment.describe(["/usr/bin/tfamp", "bench", "a b.py"])
    rows = dict(environment.rows({"environment": record}))
    assert rows["command"] == "tfamp bench 'a b.py'"
    assert rows["device"] == (
        "GPU: 2 x NVIDIA H100, compute capability 9.0, 80.0 GiB"
    )
    assert rows["versions"] == "keras 3.15.1"
    assert rows["time"].endswith("UTC")


def test_environment_of_a_record_that_says_nothing_is_empty():
    assert environment.rows({}) == []


def test_environment_of_a_run_names_its_replicas_and_its_commit():
    record = {
        "strategy": "MirroredStrategy",
        "replicas": 2,
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "start_time": "2026-01-02T03:04:05.678901+00:00",
    }
    assert dict(environment.rows(record)) == {
        "time": "2026-01-02 03:04 UTC",
        "strategy": "MirroredStrategy, 2 replicas",
        "source": "commit 0123456789ab, with changes",
    }


@pytest.mark.parametrize("name", ["bench", "parity", "probe", "tune"])
def test_a_schema_is_one_and_turns_down_a_record_without_a_field(
    name, fits_schema
):
    path = ROOT / "docs" / "schemas" / f"{name}.schema.json"
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError, match="required"):
        fits_schema({"schema": f"tfamp.{name}/1"})
