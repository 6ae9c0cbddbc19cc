"""The notebook on number formats: its sliders at all ends, and no sliders."""

import io
import pathlib
import runpy
import sys
import types

import IPython.display
import pytest
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "colab/number_formats.py"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a notebook shows, each drawn to the end."""
    figures = []

    def display(figure):
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="png")
        figures.append(figure)

    monkeypatch.setattr(IPython.display, "display", display)
    return figures


def titles(figures):
    return [axes.get_title() for figure in figures for axes in figure.axes]


@pytest.mark.slow
def test_every_end_of_every_slider_draws(monkeypatch, drawn):
    def slider(value, *, min, max, step=1, description="", readout_format=""):
        return (min, value, max)

    def interact(draw, **sliders):
        ((name, places),) = sliders.items()
        for place in places:
            draw(**{name: place})

    fake = types.SimpleNamespace(
        # The ends of this one are exponents of ten.
        FloatLogSlider=lambda value, *, min, max, **looks: (
            10.0**min,
            value,
            10.0**max,
        ),
        IntSlider=slider,
        interact=interact,
    )
    monkeypatch.setitem(sys.modules, "ipywidgets", fake)

    runpy.run_path(str(NOTEBOOK))

    shown = titles(drawn)
    for value in ("1e-09", "0.1", "1e+06"):
        assert f"{value} and the numbers around it" in shown
    for exponent in (0, 24):
        assert f"float16, loss scale 2^{exponent}" in shown


@pytest.mark.slow
def test_without_ipywidgets_some_places_are_drawn(monkeypatch, drawn, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)

    runpy.run_path(str(NOTEBOOK))

    shown = titles(drawn)
    assert "70000 and the numbers around it" in shown
    assert "float16, loss scale 2^16" in shown
    printed = capsys.readouterr().out
    assert "1e-8 with scale 1 survives: False" in printed
    assert "1e-8 with scale 1024 survives: True" in printed
    assert "10,000 times 1.0 in float16: 2048.0" in printed
    assert "10,000 times 1.0 in bfloat16: 256.0" in printed
    assert "at most nan" not in printed
