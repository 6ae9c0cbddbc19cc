"""The plots of a series."""

import warnings

from tfamp.analysis.parity import plots


def test_a_map_far_down_leaves_room_to_draw():
    precision = "/" + "a_folder/" * 20 + "tuned/tune.json"
    test = {
        "precision": precision,
        "differences": [0.01, -0.02],
        "confidence_interval": [-0.03, 0.03],
        "mean_difference": 0.0,
        "verdict": "Undecided.",
    }
    record = {"tests": [test], "margin": 0.1, "metric": "loss", "alpha": 0.05}
    with warnings.catch_warnings():
        # matplotlib says so where it does not.
        warnings.simplefilter("error")
        plot = plots.differences(record)
    assert "tuned/tune.json" in plot.svg
    assert "a_folder" not in plot.svg
