"""Output and error messages of `launch/summarize.py`."""

import errno
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
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
    """Return a function that runs the script on a text and returns the lines of standard output and standard error."""

    def call(text, *flags):
        (tmp_path / "text.txt").write_text(text)
        assert script.main(["--model", str(run.model), str(tmp_path / "text.txt"), *map(str, flags)]) == 0
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err.splitlines()

    return call


@pytest.fixture
def tells_numbers(script, monkeypatch):
    """Replace a summary by the mean of the encoder output, because a random model's summaries are nearly all equal."""
    tell = lambda summarizer, output: f"{output.last_hidden_state.mean():.5f}"  # noqa: E731
    monkeypatch.setattr(script.Summarizer, "summary_after", tell)


def summary_at_once(run, text, **how):
    """Return the model's summary of the whole text."""
    model = RecurrentBartForConditionalGeneration.from_pretrained(run.model).eval()
    tokenizer = train_tokenizer([TEXT], vocab_size=320)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return tokenizer.decode(model.generate(ids, **how)[0], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_the_summary_is_that_of_the_model(run, summarize):
    (summary,), progress = summarize(TEXT)
    assert summary
    assert summary == summary_at_once(run, TEXT, max_new_tokens=6)
    assert re.fullmatch(r"read [\d,]+ tokens in \d+ segments, [\d,]+ tokens/s", progress[-1])


@pytest.mark.slow
def test_flags_of_generation_are_heeded(run, summarize):
    (summary,), _ = summarize(TEXT, "--num_beams", 3, "--max_new_tokens", 9)
    assert summary == summary_at_once(run, TEXT, num_beams=3, max_new_tokens=9)
    assert summary != summary_at_once(run, TEXT, max_new_tokens=6)


@pytest.mark.slow
def test_standard_input_is_read_as_a_file_is(script, run, summarize, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    assert script.main(["--model", str(run.model)]) == 0
    assert capsys.readouterr().out.splitlines() == summarize(TEXT)[0]


def test_many_texts_have_a_line_each_in_their_order(script, run, tmp_path, capsys, monkeypatch):
    """There are more texts than are in memory at a time, and some summaries have several lines."""
    asked = []

    def summarize(summarizer, texts):
        asked.append((len(texts), summarizer.most_segments, summarizer.generation))
        return [f"of {text}\n  {len(text)}" for text in texts]

    monkeypatch.setattr(script.Summarizer, "encode", lambda summarizer, texts: texts)
    monkeypatch.setattr(script.Summarizer, "summarize", summarize)
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
    assert asked == [(n, 160 // 8, {"max_new_tokens": 6}) for n in (2, 2, 1)] * 2


def test_lines_of_standard_input_are_summarised_as_each_file_is(script, run, summarize, monkeypatch, capsys):
    lines = TEXT.splitlines()[:3]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(lines).encode())))
    assert script.main(["--model", str(run.model), "--each_line"]) == 0
    assert capsys.readouterr().out.splitlines() == [summary for line in lines for summary in summarize(line)[0]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--every_segment"], "--every_segment: needs one text, not several"),
        (["--save_state", "state"], "--save_state: needs one text, not several"),
        (["--tokens_per_batch", "7"], "--tokens_per_batch 7: must be at least 8, the tokens of a segment"),
        ([], "lines:2: the text is empty"),
    ],
)
def test_what_many_texts_cannot_have_is_named_in_one_line(script, run, tmp_path, capsys, flags, message):
    (tmp_path / "lines").write_text("the list\n \nof numbers")
    assert script.main(["--model", str(run.model), "--each_line", str(tmp_path / "lines"), *flags]) == 2
    assert_one_error(capsys.readouterr(), message)


@pytest.fixture
def mixed(tmp_path):
    """Write five files; the second to fourth are unreadable: empty, not UTF-8, missing."""
    names = [str(tmp_path / f"{number}.txt") for number in range(5)]
    for name, content in zip(names, (b"the list", b" \n", b"\xff", None, b"of numbers"), strict=True):
        if content is not None:
            Path(name).write_bytes(content)
    return names


def test_texts_that_cannot_be_read_are_passed_over_where_that_is_asked(script, run, summarize, mixed, capsys):
    expected = [summarize(text)[0][0] for text in ("the list", "of numbers")]
    assert script.main(["--model", str(run.model), "--skip_bad_samples", *mixed]) == 0
    printed = capsys.readouterr()
    # Each text has a line, so lines match files.
    assert printed.out.split("\n") == [expected[0], "", "", "", expected[1], ""]
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    for name, reason, line in zip(mixed[1:4], ("empty", "not a UTF-8 text", "cannot be read"), warnings, strict=True):
        assert name in line
        assert reason in line


def test_so_are_blank_lines(script, run, summarize, tmp_path, capsys):
    (tmp_path / "lines").write_text("the list\n \n\nof numbers\n\n")
    expected = [summarize(text)[0][0] for text in ("the list", "of numbers")]
    assert script.main(["--model", str(run.model), "--each_line", "--skip_bad_samples", str(tmp_path / "lines")]) == 0
    printed = capsys.readouterr()
    assert printed.out.split("\n") == [expected[0], "", "", expected[1], "", ""]
    assert re.findall(r"lines:(\d): the text is empty; this text is skipped", printed.err) == ["2", "3", "5"]


def test_otherwise_they_end_it_with_what_passes_over_them(script, run, mixed, capsys):
    assert script.main(["--model", str(run.model), *mixed]) == 2
    assert_one_error(capsys.readouterr(), "1.txt: the text is empty; add --skip_bad_samples to skip this text")


def test_a_text_without_tokens_is_named_and_may_be_passed_over(script, run, tmp_path, capsys, monkeypatch):
    def summarize(summarizer, texts):
        if "soft hyphens" in texts:
            raise ValueError("document 1 of 1 has no tokens")
        return [f"of {text}" for text in texts]

    monkeypatch.setattr(script.Summarizer, "encode", lambda summarizer, texts: texts)
    monkeypatch.setattr(script.Summarizer, "summarize", summarize)
    (tmp_path / "lines").write_text("the list\nsoft hyphens\nof numbers\n")
    flags = ["--model", str(run.model), "--each_line", str(tmp_path / "lines")]
    assert script.main([*flags, "--skip_bad_samples"]) == 0
    assert capsys.readouterr().out == "of the list\n\nof of numbers\n"
    assert script.main(flags) == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "lines:2: document 1 of 1 has no tokens" in error


@pytest.mark.slow
def test_settings_in_force_are_shown_and_can_be_changed(script, run, summarize, tmp_path, capsys):
    model = shutil.copytree(run.model, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"min_length": 5, "no_repeat_ngram_size": 1}))
    _, said = summarize(TEXT)
    assert "generation up to 6 tokens; greedy" in said
    _, said = summarize(
        TEXT, "--num_beams", 2, "--min_new_tokens", 3, "--no_repeat_ngram_size", 2, "--length_penalty", 0.5
    )
    (line,) = (line for line in said if line.startswith("generation"))
    for part in ("2 beams", "min_new_tokens 3", "no_repeat_ngram_size 2", "length_penalty 0.5"):
        assert part in line
    (tmp_path / "text.txt").write_text(TEXT)
    assert script.main(["--model", str(model), str(tmp_path / "text.txt"), str(tmp_path / "text.txt")]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("generation"))
    assert "min_length 5" in line


@pytest.mark.slow
def test_texts_that_are_drawn_follow_from_the_seed(summarize):
    texts = [summarize(TEXT, "--do_sample", "--temperature", 5.0, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min_new_tokens", "7"], "--min_new_tokens 7: must be at most 6, the maximum length of a text"),
        (["--min_new_tokens", "-1"], "--min_new_tokens -1: must be at least 0"),
        (["--max_new_tokens", "65"], "--max_new_tokens 65: must be at most 64, the positions of the decoder"),
        (["--length_penalty", "2"], "--length_penalty has no effect without beam search; set --num_beams"),
        (["--skip_bad_samples"], "--skip_bad_samples: needs several texts"),
    ],
)
def test_settings_that_cannot_hold_are_named_in_one_line(script, run, tmp_path, capsys, flags, message):
    (tmp_path / "text.txt").write_text(TEXT)
    assert script.main(["--model", str(run.model), str(tmp_path / "text.txt"), *flags]) == 2
    assert_one_error(capsys.readouterr(), message)


@pytest.mark.slow
def test_a_model_whose_run_had_longer_targets_than_it_has_positions_for_ends_its_texts_there(script, tmp_path, capsys):
    run = write_run_with_model(
        tmp_path / "run", [TEXT], {"data": {"max_target_length": 1200}}, forced_eos_token_id=None
    )
    (tmp_path / "text.txt").write_text(TEXT)
    # The summary cannot end before its maximum length.
    flags = ["--min_new_tokens", "64"]
    assert script.main(["--model", str(run.model), str(tmp_path / "text.txt"), *flags]) == 0
    assert "generation up to 64 tokens" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_told_in_one_line(script, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script, "summarize", full)
    assert script.main(["--model", str(run.model), str(tmp_path / "text.txt")]) == 1
    assert_one_error(capsys.readouterr(), "No space left on device")


def test_a_context_that_grows_is_told_and_can_be_bounded(script, run, summarize, capsys, monkeypatch, request):
    text = (run.model / "config.json").read_text()
    request.addfinalizer(lambda: (run.model / "config.json").write_text(text))
    config = json.loads(text)
    (run.model / "config.json").write_text(json.dumps(config | {"decoder_context": "all"}))
    monkeypatch.setattr(script, "MANY_SEGMENTS", 3)
    few_lines = TEXT[:240]
    whole, told = summarize(few_lines, "--every_segment")
    assert told.count(script.GROWING) == 1
    bounded, silent = summarize(few_lines, "--every_segment", "--context_segments", 1)
    assert script.GROWING not in silent
    (run.model / "config.json").write_text(json.dumps(config | {"decoder_context": "all", "context_segments": 1}))
    assert bounded == summarize(few_lines, "--every_segment")[0]
    assert len(bounded) == len(whole) > 4
    (run.model / "config.json").write_text(json.dumps(config | {"decoder_context": "last"}))
    assert script.main(["--model", str(run.model), "--context_segments", "1"]) == 2
    assert "--context_segments 1: the model's decoder_context is last" in capsys.readouterr().err


@pytest.mark.slow
def test_every_segment_has_its_summary(summarize, tells_numbers):
    summaries, progress = summarize(TEXT, "--every_segment")
    assert len(summaries) == int(re.search(r"(\d+) segments", progress[-1])[1]) > 10
    assert summaries[-1:] == summarize(TEXT)[0]
    assert len(set(summaries)) > 1


@pytest.mark.parametrize("end", ["", "\n", "\n***", "\n***\n\n"], ids=repr)
def test_each_section_has_its_summary(summarize, tells_numbers, end):
    sections = TEXT.split("\n")[:3]
    text = "***\n" + sections[0] + "\n\n *** \n***\n" + "\n***\n".join(sections[1:]) + end
    summaries, _ = summarize(text, "--section_separator", "***")
    assert len(summaries) == len(set(summaries)) == 3
    # the first section is read as a text that ends there
    assert summaries[:1] == summarize(sections[0])[0]


def test_each_section_has_a_text(run, summarize):
    sections = TEXT.split("\n")[:2]
    texts, _ = summarize("\n***\n".join(sections), "--section_separator", "***")
    assert len(texts) == 2
    assert texts[0] == summary_at_once(run, sections[0], max_new_tokens=6)


def test_a_section_is_continued_with_its_state(summarize, tells_numbers, tmp_path):
    first, second = TEXT[:60], TEXT[60:200]
    summaries, _ = summarize(f"{first}\n***\n{second}", "--section_separator", "***")
    assert summarize(f"{first}\n***\n{second[:30]}", "--section_separator", "***", "--save_state", tmp_path / "state")
    rest = summarize(second[30:], "--section_separator", "***", "--load_state", tmp_path / "state")[0]
    assert rest == summaries[1:]


def test_a_text_of_separators_alone_is_refused(script, run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("***\n\n***\n")
    flags = ["--model", str(run.model), str(tmp_path / "text.txt"), "--section_separator", "***"]
    assert script.main(flags) == 2
    assert_one_error(capsys.readouterr(), "the text has no tokens")


@pytest.mark.parametrize("value", ["", " ", "a\nb"], ids=repr)
def test_a_separator_is_one_line(script, run, capsys, value):
    with pytest.raises(SystemExit):
        script.main(["--model", str(run.model), "--section_separator", value])
    assert "must be one line that is not blank" in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_can_be_gone_on_with_later(summarize, tells_numbers, tmp_path):
    first, rest = TEXT[:-4], TEXT[-4:]
    summarize(first, "--save_state", tmp_path / "state")
    whole = summarize(TEXT)[0]
    assert summarize(rest, "--load_state", tmp_path / "state")[0] == whole
    assert whole not in (summarize(first)[0], summarize(rest)[0])


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", " \n"])
def test_a_state_without_new_text_gives_the_summary_of_the_earlier_text(summarize, tmp_path, more):
    whole, progress = summarize(TEXT, "--save_state", tmp_path / "state")
    assert int(progress[-1].split()[1].replace(",", "")) > 8
    again, progress = summarize(more, "--load_state", tmp_path / "state")
    assert again == whole
    # the last segment is encoded again, but its tokens are not new
    assert progress[-1].startswith("read 0 tokens in 1 segments")


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
    assert_one_error(capsys.readouterr(), "--model .*missing: no such folder; give the folder of a model")
    (tmp_path / "broken").mkdir()
    for file in run.model.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(b"{}" if "safetensors" in file.name else file.read_bytes())
    assert script.main(["--model", str(tmp_path / "broken"), str(text)]) == 2
    assert_one_error(capsys.readouterr(), "--model .*broken: ")
    weights = (run.model / "model.safetensors").read_bytes()
    for n_bytes in (0, 100, len(weights) - 1):
        (tmp_path / "broken" / "model.safetensors").write_bytes(weights[:n_bytes])
        assert script.main(["--model", str(tmp_path / "broken"), str(text)]) == 2
        assert_one_error(capsys.readouterr(), "--model .*broken: the model cannot be read .*copy or download it again")
    assert script.main(["--model", str(run.path), str(text)]) == 2
    assert_one_error(
        capsys.readouterr(), "--model .*run: this is the folder of a run; give the model of the run, .*run/model"
    )


def test_a_state_that_cannot_be_used_is_named_in_one_line(script, run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert script.main(["--model", str(run.model), str(text), "--load_state", str(text)]) == 2
    assert_one_error(capsys.readouterr(), "text.txt: the saved state cannot be read")
    assert script.main(["--model", str(run.model), str(text), "--save_state", str(tmp_path / "no" / "state")]) == 2
    assert_one_error(capsys.readouterr(), "--save_state .*state: the folder .* does not exist")
