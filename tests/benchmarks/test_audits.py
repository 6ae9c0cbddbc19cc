"""The page of audits: what it shows, and what it calls short."""

import json

import pytest

from benchmarks import audits
from tfamp.errors import InputError

CLEAN = {
    "kernels": {
        "operations": 7,
        "on_host": ["IteratorGetNext output_types=float32"],
        "missing": [],
        "host_reads": ["IsFinite -> If.cond"],
    },
    "gpu": {
        "operations": 9,
        "products": {"bf16 bf16": 3},
        "converts": 4,
        "host": [],
        "wide": ["gradient_tape/model/logits_1/MatMul"],
        "heads": ["logits"],
    },
    "tpu": {
        "device": "TPU v5 lite",
        "versions": "jax 1, libtpu 2",
        "seconds": 1.0,
        "argument_bytes": 2_000_000,
        "temporary_bytes": 0,
        "code_bytes": 500_000,
        "operations": 3e9,
        "products": {"bf16 bf16": 3},
        "host": [],
        "wide": ["model/logits_1/MatMul"],
    },
}


def test_a_row_shows_what_was_found():
    page = audits.to_markdown(
        {
            "versions": {"TensorFlow": "0"},
            "recipes": {"gan mixed_bfloat16": CLEAN, "gan float32": {}},
        }
    )
    clean, empty = page.splitlines()[-2:]

    assert clean == (
        "| gan | mixed_bfloat16 | 7 | IteratorGetNext | 1 | 9 | 3 bf16 bf16 | "
        "4 | - | 3 bf16 bf16 | 3.00 | 2.0 | 0.0 | 0.5 | - |"
    )
    assert empty.count("|") == clean.count("|")
    assert "jax 1, libtpu 2" in page


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("kernels", {"missing": ["A T=int64"]}, "no kernel for GPUs"),
        ("gpu", {"wide": ["model/logits_2x/dot"]}, "gpu: a float32 product"),
        ("gpu", {"host": ["infeed"]}, "gpu: calls the host"),
        ("tpu", {"wide": ["?"]}, "tpu: a float32 product"),
        ("tpu", {"error": "no"}, "tpu: does not compile"),
    ],
)
def test_what_must_not_be_there_is_named(kind, change, expected):
    row = CLEAN | {kind: CLEAN[kind] | change}

    assert audits.falls_short("mixed_bfloat16", CLEAN) == []
    assert audits.falls_short("mixed_bfloat16", row) == [expected]
    is_wide = "product" in expected
    assert audits.falls_short("float32", row) == ([] if is_wide else [expected])


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    path = tmp_path / "audits.json"
    path.write_text(json.dumps({"schema": "another"}))

    with pytest.raises(InputError, match=r"audits.json is no record"):
        audits.measure(audits.Config(output_dir=str(tmp_path)))
    assert json.loads(path.read_text()) == {"schema": "another"}


def test_unknown_recipes_are_one_line():
    with pytest.raises(InputError, match="Unknown 'gpt'"):
        audits.Config(recipes=("gpt",))
