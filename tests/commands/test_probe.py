"""`tfamp probe` writes its findings and refuses what it cannot do."""

import json

import pytest

from tests.conftest import ROOT
from tfamp import cli

RECIPE = str(ROOT / "tests" / "analysis" / "probe" / "probe_recipe.py")


def test_the_command_writes_json_and_a_report(tmp_path, capsys, fits_schema):
    arguments = ["probe", RECIPE, "--steps=2", f"--output_dir={tmp_path}"]
    assert cli.main(arguments) == 0
    record = json.loads((tmp_path / "probe.json").read_text())
    fits_schema(record)
    assert record["steps"] == 2
    assert record["recommended_precision"] == "mixed_float16"
    observed = record["observed"]
    assert observed["scale"] == record["float16_scale"]
    for each in observed["tensors"]:
        for share in ("zero", "subnormal", "overflow"):
            predicted, seen = each["predicted"][share], each["observed"][share]
            assert predicted == pytest.approx(seen, abs=0.05)
    assert "<svg" in (tmp_path / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "best loss scale for float16" in printed
    assert record["reason"] in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps=0 must be at least 1"),
        (["--config.precision=float32"], "sets the recipe's precision"),
        (["--config.nothing=1"], "nothing"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path, capsys, arguments, message
):
    folder = tmp_path / "out"
    status = cli.main(["probe", RECIPE, f"--output_dir={folder}", *arguments])
    assert status == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()
