"""`launch/summarize.py`: what it prints, where, and what it says of what it cannot read."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from launching import assert_one_error, load_script
from recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.data.tokenizer import train_tokenizer
from runs import write_run_with_model

TEXT = "\n".join(f"the {word} of a list, number {i} é" for i, word in enumerate(dir(str)[:40]))


@pytest.fixture(scope="module")
def script():
    return load_script("summarize")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run_with_model(tmp_path_factory.mktemp("runs") / "run", [TEXT], {"data": {"max_target_length": 6}})


@pytest.fixture
def summarize(script, run, capsys, tmp_path):
    """Runs the script on a text; gives its lines on standard output and on standard error."""

    def call(text, *flags):
        (tmp_path / "text.txt").write_text(text)
        assert script.main(["--model", str(run.model), str(tmp_path / "text.txt"), *map(str, flags)]) == 0
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err.splitlines()

    return call


@pytest.fixture
def tells_numbers(script, monkeypatch):
    """In place of a summary, a figure of what it is made from: a random model tells the same of nearly everything."""
    monkeypatch.setattr(script, "summary_after", lambda output, *_, **how: f"{output.last_hidden_state.mean():.5f}")


def summary_at_once(run, text, **how):
    """What the model gives for the whole text."""
    model = RecurrentBartForConditionalGeneration.from_pretrained(run.model).eval()
    tokenizer = train_tokenizer([TEXT], vocab_size=320)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return tokenizer.decode(model.generate(ids, **how)[0], skip_special_tokens=True).strip()


def test_the_summary_is_that_of_the_model(run, summarize):
    (summary,), progress = summarize(TEXT)
    assert summary
    assert summary == summary_at_once(run, TEXT, max_new_tokens=6)
    assert re.fullmatch(r"read [\d,]+ tokens in \d+ segments, [\d,]+ tokens/s", progress[-1])


def test_flags_of_generation_are_heeded(run, summarize):
    (summary,), _ = summarize(TEXT, "--num_beams", 3, "--max_new_tokens", 9)
    assert summary == summary_at_once(run, TEXT, num_beams=3, max_new_tokens=9)
    assert summary != summary_at_once(run, TEXT, max_new_tokens=6)


def test_standard_input_is_read_as_a_file_is(script, run, summarize, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    assert script.main(["--model", str(run.model)]) == 0
    assert capsys.readouterr().out.splitlines() == summarize(TEXT)[0]


def test_many_texts_have_a_line_each_in_their_order(script, run, tmp_path, capsys, monkeypatch):
    """Also where they are more than are in memory at a time, and where a summary has several lines."""
    asked = []

    class FakeSummariser:
        def __init__(self, model, tokenizer, tokens_per_batch, **how):
            asked.append((tokens_per_batch, how))

        def summarise(self, texts):
            asked.append(len(texts))
            return [f"of {text}\n  {len(text)}" for text in texts]

    monkeypatch.setattr(script, "Summariser", FakeSummariser)
    monkeypatch.setattr(script, "WINDOW", 2)
    texts = ["the list", "of", "numbers é", "is", "long"]
    files = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    (tmp_path / "lines").write_text("\n".join(texts) + "\n")
    flags = ["--model", str(run.model), "--num_beams", "2", "--tokens_per_batch", "160"]
    for given in (map(str, files), ["--each_line", str(tmp_path / "lines")]):
        assert script.main([*flags, *given]) == 0
        assert capsys.readouterr().out.splitlines() == [f"of {text} {len(text)}" for text in texts]
    assert asked == [(160, {"max_new_tokens": 6, "num_beams": 2}), 2, 2, 1] * 2


def test_lines_of_standard_input_are_summarised_as_each_file_is(script, run, summarize, monkeypatch, capsys):
    lines = TEXT.splitlines()[:3]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(lines).encode())))
    assert script.main(["--model", str(run.model), "--each_line"]) == 0
    assert capsys.readouterr().out.splitlines() == [summary for line in lines for summary in summarize(line)[0]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--every_segment"], "--every_segment: for one text, not for several"),
        (["--save_state", "state"], "--save_state: for one text, not for several"),
        (["--tokens_per_batch", "7"], "--tokens_per_batch 7: a segment has up to 8 tokens"),
        ([], "lines:2: the text is empty"),
    ],
)
def test_what_many_texts_cannot_have_is_named_in_one_line(script, run, tmp_path, capsys, flags, message):
    (tmp_path / "lines").write_text("the list\n \nof numbers")
    assert script.main(["--model", str(run.model), "--each_line", str(tmp_path / "lines"), *flags]) == 2
    assert_one_error(capsys.readouterr(), message)


def test_every_segment_has_its_summary(summarize, tells_numbers):
    summaries, progress = summarize(TEXT, "--every_segment")
    assert len(summaries) == int(re.search(r"(\d+) segments", progress[-1])[1]) > 10
    assert summaries[-1:] == summarize(TEXT)[0]
    assert len(set(summaries)) > 1


def test_a_text_can_be_gone_on_with_later(summarize, tells_numbers, tmp_path):
    first, rest = TEXT[:-4], TEXT[-4:]
    summarize(first, "--save_state", tmp_path / "state")
    whole = summarize(TEXT)[0]
    assert summarize(rest, "--load_state", tmp_path / "state")[0] == whole
    assert whole not in (summarize(first)[0], summarize(rest)[0])


def test_pieces_may_end_within_a_character_or_line_end(script, monkeypatch):
    monkeypatch.setattr(script, "BLOCK", 1)
    text = "\ufeffé\r\n東京\r🙂"
    assert "".join(script.text_pieces(io.BytesIO(text.encode()), "name")) == "é\n東京\n🙂"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text.txt: cannot be read \(No such file or directory\)"),
        (b"", "text.txt: the text is empty"),
        (b" \n\t\n", "text.txt: the text is empty"),
        (b"the list\xff of numbers", r"text.txt: not a UTF-8 text \(invalid start byte: byte 0xff\)"),
        (b"the list\xc3", r"text.txt: not a UTF-8 text \(unexpected end of data: byte 0xc3\)"),
    ],
    ids=["missing", "empty", "blank", "undecodable", "cut within a character"],
)
def test_an_unreadable_file_is_named_in_one_line(content, message, script, run, tmp_path, capsys):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert script.main(["--model", str(run.model), str(tmp_path / "text.txt")]) == 2
    assert_one_error(capsys.readouterr(), message)


def test_what_is_no_model_is_named_in_one_line(script, run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert script.main(["--model", str(tmp_path / "missing"), str(text)]) == 2
    assert_one_error(capsys.readouterr(), "--model .*missing: no model there")
    (tmp_path / "broken").mkdir()
    for file in run.model.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(b"{}" if "safetensors" in file.name else file.read_bytes())
    assert script.main(["--model", str(tmp_path / "broken"), str(text)]) == 2
    assert_one_error(capsys.readouterr(), "--model .*broken: ")


def test_a_state_that_cannot_be_used_is_named_in_one_line(script, run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert script.main(["--model", str(run.model), str(text), "--load_state", str(text)]) == 2
    assert_one_error(capsys.readouterr(), "text.txt: no saved state can be read")
    assert script.main(["--model", str(run.model), str(text), "--save_state", str(tmp_path / "no" / "state")]) == 2
    assert_one_error(capsys.readouterr(), "--save_state .*state: no folder")
