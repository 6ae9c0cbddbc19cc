"""How the cost of a step grows: the same work is timed, and told rightly."""

import keras
import numpy as np
import pytest

from benchmarks.scaling import __main__ as program
from benchmarks.scaling import page, points
from benchmarks.scaling.series import SERIES

LAYERS, *_, VARIABLES, _REPLICAS, WORKERS, LOOP = SERIES


def test_every_loop_does_the_same_work():
    weights = {}
    for variant in LOOP.variants:
        keras.utils.set_random_seed(0)
        model, batch = points._model_and_batch("loop", 1)
        before = model.get_weights()
        seconds = points._TRAINERS[variant](model, batch, 3, 1)
        assert len(seconds) == 3
        assert min(seconds) > 0
        weights[variant] = model.get_weights()
        assert not np.allclose(weights[variant][0], before[0], atol=1e-6)
    for variant in LOOP.variants:
        for ours, theirs in zip(
            weights[variant], weights["graph"], strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_the_model_of_many_variables_has_that_many():
    model, (x, _) = points._model_and_batch("variables", 7)
    assert len(model.trainable_variables) == 7
    assert model(x).shape == x.shape


def point(series, value, variant, milliseconds):
    return {
        "series": series,
        "value": value,
        "variant": variant,
        "parameters": 10 * value,
        "step_milliseconds": milliseconds,
    }


def made_up_points():
    """Two rounds: 3 ms and half a ms a layer, the second round slower."""
    return [
        point("layers", layers, "tfamp", extra + 3 + 0.5 * layers)
        for extra in (0, 2)
        for layers in (1, 2, 4, 8)
    ] + [point("workers", workers, "tfamp", 5) for workers in (1, 2)]


def test_a_line_tells_what_is_fixed_and_what_one_more_costs():
    summary = program.summarize(made_up_points())
    assert summary[0]["step_milliseconds"]["median"] == 4.5
    assert summary[0]["step_milliseconds"]["lowest"] == 3.5
    assert summary[0]["step_milliseconds"]["highest"] == 5.5
    (line,) = program.lines_through(summary, [LAYERS, WORKERS])
    assert line["series"] == "layers"
    assert line["fixed_milliseconds"] == pytest.approx(4)
    assert line["unit_milliseconds"] == pytest.approx(0.5)


def test_the_page_and_the_plot_show_each_series():
    pytest.importorskip("matplotlib")
    summary = program.summarize(made_up_points())
    record = {
        "quick": True,
        "precision": "float32",
        "threads": 3,
        "rounds": 2,
        "environment": {"command": "python -m benchmarks.scaling --quick"},
        "points": summary,
        "lines": program.lines_through(summary, SERIES[:1]),
    }
    text = page.to_markdown(record)
    assert "no figure here is one to quote" in text
    assert "| 8, tfamp | 8 | 7 to 9 | 80 |" in text
    assert "| layers, tfamp | 4 | 0.5 | layers |" in text
    svg = page.plot(record)
    assert LAYERS.what in svg
    assert WORKERS.what in svg


def test_workers_are_launched_and_each_has_a_process_of_its_own(tmp_path):
    config = program.Config(precision="mixed_bfloat16")
    first, second = program._jobs(WORKERS, 1, config, 3, tmp_path)
    assert first.arguments[:5] == (
        "-m",
        "tfamp.launch",
        "--workers=1",
        "benchmarks.scaling.points",
        "--",
    )
    assert "--values=2" in second.arguments
    (together,) = program._jobs(VARIABLES, 2, config, 3, tmp_path)
    assert "--values=10,100,500,1000,2000" in together.arguments
    assert "--precision=mixed_bfloat16" in together.arguments
    assert together.result != first.result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--series=depth"], "Unknown series 'depth'; expected some of layers"),
        (["--precision=float4"], "float4"),
        (["--threads=4096"], "threads=4096 is more than the"),
        (["--rounds=0"], "rounds=0 is out of range"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(flags, message, capsys):
    assert program.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
