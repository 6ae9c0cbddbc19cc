"""The README is true: its code runs, and its two commands are two lines."""

import re
import shlex

from recipes import image_classification
from tests.conftest import ROOT
from tfamp.recipe import flags

BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$",
    (ROOT / "README.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)


def blocks(language):
    return [text for found, text in BLOCKS if found == language]


def test_python_blocks_run_from_top_to_bottom(tmp_path):
    source = "\n".join(blocks("python")).replace("/tmp", str(tmp_path))
    names = {}

    exec(compile(source, "README.md", "exec"), names)

    assert names["results"]["accuracy"] > 0.5
    assert names["history"].history["skipped_steps"] == [0] * 5


def test_the_two_commands_of_a_newcomer_are_one_line_each():
    run, test = blocks("bash")[:2]
    assert run.count("\n") == test.count("\n") == 1
    assert "-m pytest -q" in test
    *_, module, flag = shlex.split(run)
    assert module == image_classification.__name__
    _, parsed = flags.parse_flags(image_classification.Config, [flag])
    assert parsed.precision == "mixed_bfloat16"


def test_it_is_read_in_a_few_minutes():
    assert (ROOT / "README.md").read_text().count("\n") <= 150


def test_the_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
