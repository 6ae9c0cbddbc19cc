"""Each failure fails as its docstring says, and its fix mends it."""

import dataclasses
import math

import pytest

import tfamp
from recipes import failures
from recipes.failures import contrast, curves
from tests.conftest import first_always, mostly_slow
from tfamp.analysis.lint.check import lint
from tfamp.analysis.probe.measure import probe
from tfamp.recipe.subject import open_subject


@pytest.fixture
def config(digits_dir):
    return failures.Config(data_dir=digits_dir)


def last_loss(config):
    subject = open_subject(failures, config)
    history = failures.fit(subject.model, subject.train_batches, config)
    return history.history[failures.FAILURES[config.failure].curve][-1]


@pytest.mark.parametrize(
    ("failure", "epochs", "mistake_above", "mended_below"),
    mostly_slow(
        [
            ("no_loss_scaling", 4, 0.4, 0.2),
            ("sixteen_bit_weights", 4, 2.4, 1.2),
            ("float16_accumulation", 5, 0.17, 0.13),
            ("attention_overflow", 2, math.nan, 0.8),
            ("clipping_scaled_gradients", 2, 2.2, 0.7),
            ("float16_softmax", 3, 0.4, 0.25),
            ("float8_without_scales", 4, 0.4, 0.2),
        ],
        always=[("clipping_scaled_gradients", 2, 2.2, 0.7)],
    ),
)
def test_a_mistake_spoils_training_and_its_fix_mends_it(
    config, failure, epochs, mistake_above, mended_below
):
    config = dataclasses.replace(config, failure=failure, epochs=epochs)
    spoiled = last_loss(config)
    mended = last_loss(dataclasses.replace(config, healed=True))
    if math.isnan(mistake_above):
        assert math.isnan(spoiled)
    else:
        assert spoiled > mistake_above
    assert mended < mended_below


@pytest.mark.parametrize(
    ("failure", "rule"),
    first_always(
        [
            ("no_loss_scaling", "no-loss-scaling"),
            ("sixteen_bit_weights", "weights-in-16-bits"),
            ("attention_overflow", "attention-softmax"),
            ("clipping_scaled_gradients", "clipped-scaled-gradients"),
            ("float16_softmax", "sensitive-output"),
        ],
        1,
    ),
)
def test_lint_sees_the_mistake_beforehand_and_passes_the_mended_model(
    config, failure, rule
):
    config = dataclasses.replace(config, failure=failure)
    for healed in (False, True):
        subject = open_subject(
            failures, dataclasses.replace(config, healed=healed)
        )
        batch = next(iter(subject.train_batches))
        errors = [
            finding.rule
            for finding in lint(subject.model, batch)
            if finding.severity == "error"
        ]
        assert (rule in errors) != healed
        assert not (healed and errors)


@pytest.mark.slow
def test_probe_names_the_attention_that_overflows(config):
    config = dataclasses.replace(config, failure="attention_overflow")
    subject = open_subject(failures, config)
    report = probe(subject.model, subject.train_batches, steps=1)
    assert "logits" in report.float32_layers


@pytest.mark.slow
def test_the_program_tells_of_lint_probe_curves_and_the_end(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(contrast, "_PROBED_STEPS", 1)
    config = dataclasses.replace(
        config,
        failure="sixteen_bit_weights",
        epochs=2,
        output_dir=str(tmp_path),
    )
    losses = contrast.main(config)
    assert losses["loss_with_mistake"] > 4 * losses["loss_mended"]
    assert losses["loss_mended"] == pytest.approx(
        losses["loss_float32"], rel=0.05
    )
    printed = capsys.readouterr().out
    for expected in (
        "weights-in-16-bits first",
        "lint: 0 findings",
        "probe: mixed_float16",
        "loss by epoch: x with the mistake, o mended, . float32",
        "With the mistake loss ends at",
    ):
        assert expected in printed
    svg = (tmp_path / "failures.svg").read_text()
    assert svg.startswith("<svg")
    assert "with the mistake" in svg


def test_a_curve_runs_from_its_first_loss_to_its_last_on_a_log_scale():
    text = curves.as_text(
        [
            curves.Curve("falling", "x", "black", [100.0, 1.0]),
            curves.Curve("flat", ".", "black", [10.0, 10.0]),
        ],
        "loss",
    )
    heading, *rows = text.splitlines()
    assert heading == "loss by epoch: x falling, . flat"
    cells = [row.partition("|")[2] for row in rows if "|" in row]
    assert cells[0].startswith("x")
    assert cells[-1].endswith("x")
    assert len(cells[-1]) == 60
    assert rows[0].split()[0] == "100"
    # 10 is in the middle of 1 and 100, if they are spaced by ratio.
    assert [row.split()[0] for row in rows if row.endswith(".")] == ["10"]


def test_what_is_not_finite_stands_above_the_numbers():
    text = curves.as_text(
        [curves.Curve("broken", "x", "black", [1.0, math.nan, math.inf])],
        "loss",
    )
    marks = text.splitlines()[1].partition("|")[2]
    assert text.splitlines()[1].strip().startswith("not finite")
    assert marks.startswith(" !")
    assert len(marks) == 60


@pytest.mark.slow
def test_training_returns_the_metrics_of_the_test_images(config):
    config = dataclasses.replace(
        config, failure="clipping_scaled_gradients", healed=True, epochs=2
    )
    results = failures.train(config)
    assert set(results) == {"loss", "accuracy"}
    assert results["accuracy"] > 0.7


def test_an_unknown_failure_ends_in_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        tfamp.recipe.main(
            contrast.main, failures.Config, ["failures", "--failure=gravity"]
        )
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no_loss_scaling" in error
