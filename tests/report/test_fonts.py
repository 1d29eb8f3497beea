"""Figures with Japanese names are drawn without warnings, in an installed font if there is one."""

import warnings
from types import SimpleNamespace

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from recurrent_bart.report import drawing

NAME = "会議録"


@pytest.fixture
def figure():
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([1, 2], label=NAME)
    axes.set_title(NAME)
    axes.legend()
    return figure


@pytest.fixture(autouse=True)
def _find_fonts_anew():
    drawing.font_families.cache_clear()
    yield
    drawing.font_families.cache_clear()


def test_a_missing_letter_gives_no_warning(figure, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.write_png(figure, tmp_path / "a.png")
        svg = drawing.to_svg(figure, "a")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0
    # the letters are text, which the viewer's fonts draw
    assert svg.count(NAME) == 2


def test_the_first_installed_font_of_the_list_is_used(figure, monkeypatch):
    names = [SimpleNamespace(name=name) for name in ("Yu Gothic", "IPAGothic", "another")]
    monkeypatch.setattr(drawing.font_manager.fontManager, "ttflist", names)
    assert drawing.font_families() == ("DejaVu Sans", "IPAGothic")
    drawing.font_families.cache_clear()
    monkeypatch.setattr(drawing.font_manager.fontManager, "ttflist", names[2:])
    assert drawing.font_families() == ("DejaVu Sans",)
