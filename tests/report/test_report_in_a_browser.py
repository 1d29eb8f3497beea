"""Report in a real browser."""

import pytest

from browser import look_at
from recurrent_bart.report.drawing import COLORS
from recurrent_bart.report.page import DARK, write_report
from recurrent_bart.report.run_record import read_run
from reported_runs import Page, evaluation_record, sample, step_record, write_run

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("_browser")]


@pytest.fixture(scope="module", params=[1, 3], ids=["one run", "three runs"])
def file(request, tmp_path_factory):
    """Return the file of a page."""
    folder = tmp_path_factory.mktemp("report")
    records = [evaluation_record(0), *(step_record(n) for n in range(2, 21, 2)), evaluation_record(20)]
    samples = [sample("paper-1", "<b>a source</b>", "a target", "a generated text")]
    runs = [write_run(folder / f"run-{n}", records, samples, max_steps=40 + n) for n in range(request.param)]
    return write_report([read_run(run, {}) for run in runs], folder / "report.html")[0]


def color_of(pixel):
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in pixel[:3])


@pytest.mark.parametrize("is_dark", [False, True], ids=["by day", "by night"])
def test_the_page_is_shown_without_an_error_and_without_the_network(file, is_dark, tmp_path):
    seen = look_at(file, tmp_path, is_dark)
    assert seen.console == []
    assert seen.requests == []
    height, width, _ = seen.picture.shape
    assert (height, width) == (1400, 1000)
    colors = DARK if is_dark else COLORS
    assert color_of(seen.picture[5, 5]) == colors["paper"]
    shown = {color_of(pixel) for row in seen.picture[::2, ::2] for pixel in row}
    assert colors["ink"] in shown
    assert len(shown) > 50


def test_the_page_shows_its_numbers(file, tmp_path):
    page = Page(look_at(file, tmp_path).html)
    figures = {"5.0000", "6.0000", "31.25", "17,500", "37 %", "2.50", "3.0 GiB"}
    drawn = {"0.31", "0.43", "5.10", "0.80", "cross-entropy per target token"}
    assert figures <= set(page.texts)
    assert drawn <= {text.split(": ")[0] for text in page.texts}
    assert "<b>a source</b>" in page.texts


def test_the_page_fits_a_phone(file, tmp_path):
    """Elements wider than the page are scrollable."""
    marked = tmp_path / "marked.html"
    script = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    marked.write_text(file.read_text().replace("default-src 'none';", "").replace("</body>", script))
    assert "<title>500</title>" in look_at(marked, tmp_path, size=(500, 900)).html


def test_errors_and_requests_are_detected(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>missing()</script><img src='http://127.0.0.1:9/x.png'>")
    seen = look_at(page, tmp_path)
    assert any("missing is not defined" in line for line in seen.console)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
