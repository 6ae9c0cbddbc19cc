"""Two checkouts are measured in turns."""

import pathlib

import pytest

from benchmarks.checkouts import __main__ as checkouts

ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_no_checkout_is_refused(tmp_path, capfd):
    assert checkouts.main([f"--before={tmp_path}"]) == 2
    assert "is no checkout of tfamp" in capfd.readouterr().err


def test_an_unknown_case_is_refused(capfd):
    assert checkouts.main(["--before=.", "--cases=vgg"]) == 2
    assert "Unknown 'vgg'; expected some of mlp" in capfd.readouterr().err


@pytest.mark.slow
def test_each_checkout_trains_with_its_own_package(tmp_path, capfd):
    for name in ("tfamp", "benchmarks", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    argv = ["--cases=mlp", "--pairs=1", "--rounds=2", "--steps=5"]

    assert checkouts.main([f"--before={tmp_path}", *argv]) == 0

    last = capfd.readouterr().out.splitlines()[-1]
    cells = [each.strip() for each in last.strip("|").split("|")]
    assert cells[:2] == ["mlp", "mixed_bfloat16"]
    assert all(float(each.split()[0]) > 0 for each in cells[2:])


@pytest.mark.slow
def test_another_package_than_that_of_the_checkout_is_refused(tmp_path, capfd):
    package = tmp_path / "tfamp"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\n"
        "del sys.modules['tfamp']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import tfamp\n"
    )
    argv = ["--cases=mlp", "--pairs=1", "--rounds=2", "--steps=5"]

    assert checkouts.main([f"--before={tmp_path}", *argv]) == 1

    assert "was to be measured, and not" in capfd.readouterr().err
