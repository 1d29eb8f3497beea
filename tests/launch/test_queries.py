"""Commands on documents with questions: `--query_column` of a run, `--query` of its model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from launching import load_script
from runs import WORDS, flags, write_run_with_model


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Write documents with sections and a question, and with lists of questions as QMSum publishes them."""
    folder = tmp_path_factory.mktemp("asked")
    for split, n_documents in (("train", 8), ("validation", 3)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(n_documents):
                sections = [" ".join((WORDS * 3)[number : number + size]) for size in (20, 7)]
                turns = [{"speaker": WORDS[number], "text": section} for section in sections]
                query = f"{WORDS[number]} and"
                general, specific = ([{"query": f"{query} {end}", "answer": end}] for end in WORDS[:2])
                record = {"id": f"{split}-{number}", "sections": [[section] for section in sections], "document": turns}
                record |= {"summaries": ["ant", ["bee", "cow"]], "query": query}
                record["meeting_transcripts"] = [
                    {"speaker": turn["speaker"], "content": turn["text"]} for turn in turns
                ]
                record |= {"general_query_list": general, "specific_query_list": specific}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return folder


def losses_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "column"), [("sections", "query"), ("document", "general_query_list,specific_query_list")]
)
def test_a_run_with_questions_resumes_bit_for_bit_and_its_model_is_evaluated_and_asked(
    asked, task, column, train_main, tmp_path, capsys
):
    given = {"task": task, "max_steps": 4, "query_column": column, "segment_size": 24}
    if task == "document":
        given |= {"text_column": "meeting_transcripts", "summary_column": "answer"}
    whole, cut, plain = tmp_path / "whole", tmp_path / "cut", tmp_path / "plain"
    for folder in (whole, cut):
        assert train_main(flags(asked, folder, **given)) == 0
    (cut / "checkpoints" / "step-00000004").rename(tmp_path / "taken away")
    assert train_main(["--resume", str(cut)]) == 0
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    capsys.readouterr()
    assert train_main(["--resume", str(cut), "--query_column", "other"]) == 2
    assert "--query_column other: the run was started with" in capsys.readouterr().err

    json_file = tmp_path / "scores.json"
    assert load_script("evaluate").main(["--model", str(whole / "model"), "--json", str(json_file)]) == 0
    # two questions about one text are one document
    results = json.loads(json_file.read_text())
    assert results["n_documents"] == 3
    assert results["scores"]["n_words"]["low"] is not None
    predictions = [
        json.loads(line) for line in json_file.with_name("scores.predictions.jsonl").read_text().splitlines()
    ]
    assert len(predictions) == 6
    assert {prediction["document"] for prediction in predictions} == {f"validation-{number}" for number in range(3)}
    samples = (whole / "samples.md").read_text()
    assert "ant and" in samples
    lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    assert all(line["query"].split()[1] == "and" for line in lines)
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 3))
    answers = []
    for query in (["--query", "ant and"], ["--query", "owl pig owl pig"], []):
        capsys.readouterr()
        assert load_script("summarize").main(["--model", str(whole / "model"), str(tmp_path / "text.txt"), *query]) == 0
        printed = capsys.readouterr()
        answers.append(printed.out)
        assert ("give one with --query" in printed.err) == (not query)
    if task == "sections":
        without = {name: value for name, value in given.items() if name != "query_column"}
        assert train_main(flags(asked, plain, **without)) == 0
        assert losses_of(plain) != losses_of(whole)
        capsys.readouterr()
        arguments = ["--model", str(plain / "model"), str(tmp_path / "text.txt"), "--query", "ant"]
        assert load_script("summarize").main(arguments) == 0
        assert "the model was trained without questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_column": "query", "segment_size": 5}, "train.jsonl: document 'train-0': the query has "),
        ({"query_column": "question"}, "train.jsonl:1: no column 'question'; "),
        (
            {"query_column": "specific_query_list", "task": "sections"},
            "train.jsonl:1: column 'specific_query_list' has a list of questions, which needs --task document, not ",
        ),
        (
            {"query_column": "sections"},
            "train.jsonl:1: column 'sections' must be a text, or a list of objects ",
        ),
    ],
)
def test_unreadable_questions_end_the_command_in_one_line(asked, changes, message, train_main, tmp_path, capsys):
    assert train_main(flags(asked, tmp_path / "run", **changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_document_whose_question_is_too_long_is_skipped_and_counted(asked, train_main, tmp_path, capsys):
    records = [json.loads(line) for line in (asked / "train.jsonl").read_text().splitlines()]
    records[2]["query"] = " ".join(WORDS)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    changes = {"task": "sections", "query_column": "query"}
    place = f"{tmp_path}/train.jsonl: document 'train-2': the query has "
    assert train_main(flags(tmp_path, tmp_path / "run", **changes)) == 2
    assert f"error: {place}" in capsys.readouterr().err
    assert train_main([*flags(tmp_path, tmp_path / "run", **changes), "--skip_bad_samples"]) == 0
    assert f"warning: 1 documents of {tmp_path}/train.jsonl are skipped: {place}" in "".join(capsys.readouterr())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["documents"]["train"]["number"] == 7


def test_a_too_long_query_ends_the_summaries_of_several_texts(asked, tmp_path, capsys):
    run = write_run_with_model(tmp_path / "run", [" ".join(WORDS)], {})
    (tmp_path / "lines").write_text("ant bee\ncow\n")
    arguments = ["--model", str(run.model), "--each_line", "--skip_bad_samples", "--query", " ".join(WORDS * 9)]
    assert load_script("summarize").main([*arguments, str(tmp_path / "lines")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: --query: the query has " in printed.err
