"""Output and error messages of `launch/memory_map.py`."""

import re
from pathlib import Path

import matplotlib.image
import pytest

from launching import assert_one_error, load_script
from runs import write_run_with_model

TEXT = "\n".join(f"the {word} of a list, number {i} é" for i, word in enumerate(dir(str)[:20]))


@pytest.fixture(scope="module")
def script():
    return load_script("memory_map")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run_with_model(tmp_path_factory.mktemp("runs") / "run", [TEXT], {"data": {"max_target_length": 6}})


@pytest.mark.slow
def test_tables_summary_and_picture(script, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("paper.txt").write_text(TEXT)
    assert script.main(["--model", str(run.model), "paper.txt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "size of the read from the state over size of the read from tokens, by layer and segment"
    # The model has three layers.
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert all(float(number) >= 0 for line in lines[2:5] for number in line.split())
    assert re.fullmatch("summary: .+", lines[-2])
    assert lines[-1] == "picture: paper.memory.png"
    assert matplotlib.image.imread("paper.memory.png").shape[1] == 988
    assert script.main(["--model", str(run.model), "paper.txt", "--output", "other.png"]) == 0
    assert Path("other.png").read_bytes() == Path("paper.memory.png").read_bytes()


@pytest.mark.slow
def test_a_question_changes_the_map_and_a_model_of_questions_asks_for_one(script, tmp_path, monkeypatch, capsys):
    flags = {"data": {"max_target_length": 6, "query_column": "question"}}
    asked = write_run_with_model(tmp_path / "run", [TEXT], flags, segment_size=32)
    monkeypatch.chdir(tmp_path)
    Path("paper.txt").write_text(TEXT)
    found = []
    for query in ([], ["--query", "the list"], ["--query", " the list\n"]):
        assert script.main(["--model", str(asked.model), "paper.txt", *query]) == 0
        printed = capsys.readouterr()
        found.append(printed.out)
        assert ("trained with questions (--query_column question)" in printed.err) == (not query)
    assert found[0] != found[1] == found[2]
    assert script.main(["--model", str(asked.model), "paper.txt", "--query", TEXT]) == 2
    assert "--query: the query has" in capsys.readouterr().err


@pytest.mark.slow
def test_a_summary_ends_with_the_positions_of_the_decoder(script, tmp_path, monkeypatch, capsys):
    run = write_run_with_model(tmp_path / "run", [TEXT], {"data": {"max_target_length": 1200}})
    asked = []
    map_memory = script.map_memory

    def note(model, ids, attention_mask, max_new_tokens):
        asked.append(max_new_tokens)
        return map_memory(model, ids, attention_mask=attention_mask, max_new_tokens=4)

    monkeypatch.setattr(script, "map_memory", note)
    (tmp_path / "text.txt").write_text(TEXT[:200])
    output = ["--output", str(tmp_path / "x.png")]
    assert script.main(["--model", str(run.model), str(tmp_path / "text.txt"), *output]) == 0
    assert asked == [64]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt: cannot be read"),
        (b" \n", "text.txt: the text is empty"),
        (b"the list\xff", "text.txt: cannot be read .*invalid start byte"),
    ],
    ids=["missing", "blank", "undecodable"],
)
def test_an_unreadable_file_is_named_in_one_line(content, message, script, run, tmp_path, capsys):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert script.main(["--model", str(run.model), str(tmp_path / "text.txt")]) == 2
    assert_one_error(capsys.readouterr(), message)


def test_what_else_cannot_be_used_is_named_in_one_line(script, run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:100])
    assert script.main(["--model", str(tmp_path / "missing"), str(text)]) == 2
    assert_one_error(capsys.readouterr(), "--model .*missing: no such folder; give the folder of a model")
    assert script.main(["--model", str(run.path), str(text)]) == 2
    assert_one_error(capsys.readouterr(), "--model .*run: this is the folder of a run; give the model of the run")
    assert script.main(["--model", str(run.model), str(text), "--output", str(tmp_path / "no" / "x.png")]) == 2
    assert_one_error(capsys.readouterr(), "x.png: cannot be written")
