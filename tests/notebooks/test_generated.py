"""The .ipynb files are what their sources make."""

import json
import re

import nbformat
import pytest

from colab import generate
from tests.conftest import ROOT

TITLE = """\
# %% [markdown]
# # A title
#
# - **What you will see:** a number.
# - **How long it takes:** a second.
# - **Which runtime:** TPU, or any.

# %%
print(1)
"""


def notebook(tmp_path, source=TITLE):
    path = tmp_path / "example.py"
    path.write_text(source)
    return nbformat.reads(generate.notebook_text(path), as_version=4)


def test_committed_notebooks_are_those_of_their_sources():
    assert [path.name for path in generate.stale_notebooks()] == []
    assert {path.stem for path in generate.FOLDER.glob("*.ipynb")} == {
        path.stem for path in generate.sources()
    }


def test_a_notebook_has_badge_title_setup_cell_and_no_output(tmp_path):
    made = notebook(tmp_path)

    title, setup, last = made.cells
    badge, heading = re.findall(r"^(?:\[!|# ).*$", title.source, re.M)
    assert badge.endswith(
        "(https://colab.research.google.com/github/tfamp/tfamp/blob/main/"
        "colab/example.ipynb)"
    )
    assert heading == "# A title"
    assert setup.source == generate.setup_cell()
    assert setup.source.count("\n") == 1
    assert last.source == "print(1)"
    assert [cell.outputs for cell in (setup, last)] == [[], []]
    assert made.metadata.accelerator == "TPU"
    assert made.metadata.colab.gpuType == "V5E1"


def test_some_notebooks_show_their_outputs_and_the_others_have_none():
    for path in generate.FOLDER.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        outputs = [each for cell in cells for each in cell.get("outputs", [])]
        assert bool(outputs) == (path.stem in generate.WITH_OUTPUTS), path
        assert not [o for o in outputs if o.output_type == "error"]


@pytest.mark.parametrize("name", generate.WITH_OUTPUTS)
def test_what_a_notebook_shows_is_whole_and_of_no_machine(name):
    path = generate.FOLDER / f"{name}.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    # Run once from top to bottom.
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}
    assert "stream" in {output.output_type for output in outputs}
    printed = "".join(output.get("text", "") for output in outputs)
    assert str(ROOT) not in path.read_text()
    assert "Traceback" not in printed


def test_prints_are_joined_and_of_stderr_only_our_log_is_kept():
    def printed(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    ours = "WARNING:absl:epoch 1, step 2: skipped\n"
    picture = nbformat.v4.new_output("display_data", {"image/png": "iVBORw"})
    kept = generate._whole(
        [
            printed("stdout", "a\n"),
            printed("stderr", "I0000 chatter\n"),
            printed("stdout", "b\n"),
            picture,
            picture,
            printed("stderr", f"E0000 chatter\n{ours}"),
        ]
    )
    assert [output.get("text") for output in kept] == [
        "a\nb\n",
        None,
        None,
        ours,
    ]


def test_outputs_make_no_notebook_stale(tmp_path, monkeypatch):
    (tmp_path / "example.py").write_text(TITLE)
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(generate, "WITH_OUTPUTS", ("example",))
    monkeypatch.setattr(generate, "setup_cell", lambda: "import sys")
    monkeypatch.setattr(generate, "first_cell", lambda: "setup")
    assert generate.main(["--run"]) == 0
    assert generate.stale_notebooks() == {}
    cells = nbformat.read(tmp_path / "example.ipynb", as_version=4).cells
    assert cells[2].outputs[0].text == "1\n"
    (tmp_path / "example.py").write_text(TITLE.replace("print(1)", "print(2)"))
    assert [p.name for p in generate.stale_notebooks()] == ["example.ipynb"]


def test_equal_sources_give_equal_bytes(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(TITLE)

    assert generate.notebook_text(path) == generate.notebook_text(path)
    ids = [c["id"] for c in json.loads(generate.notebook_text(path))["cells"]]
    assert ids == ["cell-00", "cell-01", "cell-02"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- **How long it takes:** a second.", "", "How long it takes"),
        ("# # A title", "#", "a title"),
        ("runtime:** TPU", "runtime:** NPU", "CPU, GPU, TPU, not 'NPU'"),
    ],
)
def test_a_title_cell_that_lacks_a_fact_is_refused(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        notebook(tmp_path, TITLE.replace(old, new))


def test_check_names_stale_notebooks_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "example.py").write_text(TITLE)
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(generate, "first_cell", lambda: "setup")

    assert generate.main(["--check"]) == 1
    assert "stale: colab/example.ipynb" in capsys.readouterr().out
    assert not (tmp_path / "example.ipynb").exists()

    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert (tmp_path / "setup_runtime.py").read_text() == "setup\n"
    (tmp_path / "example.ipynb").write_text("{}")
    assert generate.main(["--check"]) == 1


def test_another_argument_is_refused(capsys):
    assert generate.main(["--chek"]) == 2
    assert "--chek: expected --check, --run" in capsys.readouterr().err
