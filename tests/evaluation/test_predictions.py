"""Predictions are written as JSON Lines and read again; errors give file and line."""

import json
from dataclasses import asdict, replace

import pytest

from recurrent_bart.evaluation.predictions import Prediction, read_predictions, unique_names, write_predictions

SCORES = {"rouge1": 50.0, "novel_4grams": None}
PREDICTION = Prediction("a[0]", "a", 0, 2, 5, 9, ["a target"], "a text", SCORES, {"text": [1.0] * 10, "target": None})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "predictions.jsonl"


def test_predictions_are_read_as_they_were_written(file):
    """Line separators of Unicode inside a text do not end a line of the file."""
    predictions = [PREDICTION, replace(PREDICTION, id="b", text="雨\u2028\x85\n\r寒い", source="the source")]
    write_predictions(file, predictions)
    assert read_predictions(file) == predictions
    first, second = map(json.loads, file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    assert "source" not in first
    assert second["source"] == "the source"
    assert first["scores"] == SCORES
    assert "雨" in file.read_text(encoding="utf-8")


def test_fields_of_a_later_version_are_ignored(file):
    write_predictions(file, [PREDICTION])
    file.write_text(file.read_text().replace('{"id"', '{"colour": 1, "id"'))
    assert read_predictions(file) == [PREDICTION]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "predictions.jsonl: the file has no predictions"),
        ("{not json}\n", "predictions.jsonl:1: not a line of predictions.jsonl"),
        ("[1]\n", "predictions.jsonl:1: not a line of predictions.jsonl"),
        ('{"id": "a"}\n', "predictions.jsonl:1: not a line of predictions.jsonl .*'text'"),
    ],
)
def test_an_unreadable_file_is_named(file, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_predictions(file)


@pytest.mark.parametrize(
    "change",
    [
        *({"scores": value} for value in ([], {"rouge1": "50"}, {"rouge1": True}, None)),
        *({"targets": value} for value in ("a target", [1], None)),
        *({name: value} for name in ("id", "document", "text") for value in (None, 1, ["a"])),
        *({"section": value} for value in ("0", 1.5, True)),
        *({name: value} for name in ("n_sections", "n_document_tokens") for value in (None, "1", 2.5)),
        *({"shares_by_tenth": value} for value in ([1.0], {"text": 1.0}, {"text": ["a"]})),
        *({name: 1} for name in ("source", "query")),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_line(file, change):
    write_predictions(file, [PREDICTION])
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(PREDICTION) | {"id": "b"} | change) + "\n")
    (name,) = change
    with pytest.raises(ValueError, match=rf"predictions\.jsonl:2: not a line of .* \(the value of '{name}' is of the "):
        read_predictions(file)


def test_scores_may_be_whole_numbers(file):
    write_predictions(file, [replace(PREDICTION, scores={"rouge1": 50, "rouge2": 0}, section=None)])
    assert read_predictions(file)[0].scores == {"rouge1": 50, "rouge2": 0}


def test_a_missing_file_is_named(file):
    with pytest.raises(ValueError, match=r"predictions\.jsonl: unreadable predictions"):
        read_predictions(file)


def test_an_id_stands_once_in_a_file(file):
    write_predictions(file, [PREDICTION, PREDICTION])
    with pytest.raises(ValueError, match=r"predictions.jsonl:2: a second prediction with the id 'a\[0\]'"):
        read_predictions(file)


def test_documents_with_equal_ids_are_told_apart_by_their_rows():
    assert unique_names(["a", "b", "a"]) == ["a (row 0)", "b", "a (row 2)"]
