"""A file of a run that is not what its name says is told in one line."""

import json

import pytest

import tfamp
from tfamp.analysis.report import write

SCHEMA = '{"schema": "tfamp.run/1", '
CASES = [
    *(
        ("metrics.jsonl", text)
        for text in (
            "[1, 2]\n",
            "null\n",
            '"x"\n',
            "5\n",
            "{\n",
            "\n",
            '{"loss": 1}\n',
            '{"epoch": NaN}\n',
            '{"epoch": 1.5}\n',
            '{"epoch": true}\n',
            '{"epoch": "x", "loss": 1}\n',
            '{"epoch": null, "loss": 1}\n',
            '{"epoch": 0, "loss": {"a": 1}}\n',
            '{"epoch": 0}\n{"epoch": [0]}\n',
            "[" * 100_000 + "\n",
            "\udcff\n",
        )
    ),
    *(
        ("run.json", text)
        for text in (
            "",
            "[]",
            "null",
            "{",
            '{"schema": ["x"]}',
            SCHEMA + '"versions": 3}',
            SCHEMA + '"config": []}',
            SCHEMA + '"hardware": "x"}',
            SCHEMA + '"hardware": {"a": 1}}',
            SCHEMA + '"precision": 5}',
            SCHEMA + '"exit_reason": {}}',
            SCHEMA + '"git": {"commit": 5}}',
            "[" * 100_000,
            "\udcff",
        )
    ),
    *(
        ("scale.jsonl", text)
        for text in (
            '{"step": 0, "scale": 1}\n',
            '{"step": "a", "scale": "b", "reason": 5}\n',
            '{"step": 0, "scale": "1", "reason": "overflow"}\n',
            '{"step": 0, "scale": 1, "reason": "grown", "optimizer": {}}\n',
            '{"step": 0, "scale": 1, "reason": "grown", "epoch": "x"}\n',
        )
    ),
    *(
        (f"{name}.json", text)
        for name in ("probe", "bench", "parity")
        for text in (
            "{}",
            "[]",
            json.dumps({"schema": f"tfamp.{name}/1"}),
        )
    ),
    *(
        ("bench.json", json.dumps({"schema": "tfamp.bench/1", **more}))
        for more in ({"verdicts": 3}, {"verdicts": {"float32": 1}})
    ),
]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_is_told_with_its_name(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(tfamp.InputError) as raised:
        write.write(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_is_a_folder_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(tfamp.InputError, match="Is a directory"):
        write.write(tmp_path)


def test_what_looks_odd_and_is_right_is_shown(tmp_path):
    row = {"epoch": 0, "loss": None, "flag": True, "array": [1, 2]}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(row) + "\n" + '{"epoch": 1, "loss": 1e999}\n'
    )
    assert write.write(tmp_path).exists()
