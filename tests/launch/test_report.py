"""Output and error messages of `launch/report.py`."""

import re

import pytest

from launching import load_script
from reported_runs import Page, step_record, write_run
from runs import flags


@pytest.fixture(scope="module")
def script():
    return load_script("report")


@pytest.fixture
def run(tmp_path):
    losses = [2.0] * 10 + [9.0, 2.0]
    return write_run(tmp_path / "run", [step_record(10 * n, loss=loss) for n, loss in enumerate(losses)])


@pytest.mark.slow
def test_the_page_lies_in_the_run_or_where_it_is_asked_for(script, run, tmp_path, capsys):
    assert script.main([str(run)]) == 0
    assert capsys.readouterr().out == f"report in {run}/report.html; 4 charts in {run}/report\n"
    there = tmp_path / "new" / "page.html"
    assert script.main([str(run), str(run), "--output", str(there)]) == 0
    assert len(list((tmp_path / "new" / "page").glob("*.png"))) == 4
    assert "2 runs compared" in Page(there.read_text()).texts


@pytest.mark.slow
def test_high_losses_are_warned_of(script, run):
    script.main([str(run)])
    warning = "step 100: the loss is 9, the median of earlier losses is 2"
    assert warning in Page((run / "report.html").read_text()).texts


def test_what_is_no_run_is_named_in_one_line(script, tmp_path, capsys):
    assert script.main([str(tmp_path / "missing")]) == 2
    assert re.fullmatch(
        r"error: .*missing: config.json is missing; give the folder of a run\n", capsys.readouterr().err
    )


def test_a_place_that_cannot_be_written_is_named_in_one_line(script, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert script.main([str(run), "--output", str(tmp_path / "file" / "page.html")]) == 2
    assert re.fullmatch(r"error: .*file.*\n", capsys.readouterr().err)


@pytest.mark.distributed
def test_a_real_run_is_reported(script, documents, train_main, tmp_path):
    folder = tmp_path / "run"
    command_line = flags(documents, folder)
    assert train_main(command_line) == 0
    assert script.main([str(folder)]) == 0
    texts = Page((folder / "report.html").read_text()).texts
    command = texts[texts.index("command") + 1]
    assert command.startswith("launch/train.py ")
    given = dict(zip(command_line[::2], command_line[1::2], strict=True))
    said = dict(zip(command.split()[1::2], command.split()[2::2], strict=True))
    defaults = {f"--{name}": str(value) for name, value in script.default_flags().items()}
    assert said == {name: value for name, value in given.items() if defaults[name] != value}
    assert texts[texts.index("steps") + 1] == "6 of 6"
    assert texts[texts.index("state") + 1] == "finished"
    assert "validation-0" in "\n".join(texts)
    assert len(list((folder / "report").glob("*.png"))) == 4
