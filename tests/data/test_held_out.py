"""Selection of validation documents by content, not by position in the file."""

import json

import pytest

from recurrent_bart.data.held_out import HeldOut, held_out_texts
from recurrent_bart.data.rows import Columns, Row, split_of
from recurrent_bart.data.sources import find_sources


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(n, **fields):
    return [{"document": f"text {number}", "summary": "s", **fields} for number in range(n)]


def sides(path, columns=None, held_out=None):
    """Return the texts of both splits."""
    sources = find_sources(str(path), held_out=held_out)
    splits = ("train", "validation")
    return [{row.sections[0] for row in sources[split].rows("document", columns or Columns())} for split in splits]


def test_a_document_without_an_id_keeps_its_split_in_a_different_file_and_line(tmp_path):
    train, validation = sides(write(tmp_path / "a.jsonl", records(200)))
    assert 5 <= len(validation) <= 40
    others = [{"document": f"other {number}", "summary": "s"} for number in range(50)]
    renamed = sides(write(tmp_path / "b.jsonl", [*others, *reversed(records(200))]))
    assert train <= renamed[0]
    assert validation <= renamed[1]


def test_documents_with_ids_keep_the_split_of_older_runs(tmp_path):
    path = write(tmp_path / "a.jsonl", [record | {"id": f"d{i}"} for i, record in enumerate(records(200))])
    expected = {f"text {number}" for number in range(200) if split_of(f"d{number}") == "validation"}
    assert sides(path)[1] == expected
    assert sides(path, held_out=HeldOut(rule="line"))[1] == expected


def test_an_older_run_keeps_its_split(tmp_path):
    path = write(tmp_path / "a.jsonl", records(200))
    expected = {f"text {number}" for number in range(200) if split_of(f"a.jsonl:{number + 1}") == "validation"}
    assert sides(path, held_out=HeldOut(rule="line"))[1] == expected
    assert sides(path)[1] != expected


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.99])
def test_both_splits_have_a_document_if_there_are_few(n, share):
    for draw in range(20):
        rows = [Row(f"{draw}-{number}", [f"text {number}"], ["s"], f"{draw}-{number}") for number in range(n)]
        assert 1 <= len(held_out_texts(rows, share, "x")) <= n - 1


@pytest.mark.parametrize(
    "same", [records(3, id="one"), [{"id": str(i), "document": "one  text\n", "summary": "s"} for i in range(3)]]
)
def test_documents_of_a_single_group_are_refused(tmp_path, same):
    with pytest.raises(ValueError, match=r"a.jsonl: all documents have the same text, id or group.*--validation_file"):
        sides(write(tmp_path / "a.jsonl", same))


def test_questions_about_one_story_are_in_one_split(tmp_path):
    stories = [{"id": f"q{i}", "document": f"story {i // 5}", "summary": f"s {i}"} for i in range(300)]
    train, validation = sides(write(tmp_path / "a.jsonl", stories))
    assert train | validation == {f"story {number}" for number in range(60)}
    assert not train & validation


def test_sections_with_different_targets_are_in_one_split(tmp_path):
    numbers = range(5)
    documents = [
        {"sections": [f"text {i} {j}" for j in numbers], "summaries": ["s" if j == target else "" for j in numbers]}
        for i in range(40)
        for target in numbers
    ]
    sources = find_sources(str(write(tmp_path / "a.jsonl", documents)))
    found = [
        [row.sections[0].split()[1] for row in sources[split].rows("sections", Columns())]
        for split in ("train", "validation")
    ]
    assert sum(map(len, found)) == 200
    assert not set(found[0]) & set(found[1])


def test_a_group_is_in_one_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [r | {"id": f"d{i}", "day": i // 4} for i, r in enumerate(records(200))])
    groups = [{int(text.split()[1]) // 4 for text in side} for side in sides(path, Columns(group="day"))]
    assert not groups[0] & groups[1]
    ungrouped = [{int(text.split()[1]) // 4 for text in side} for side in sides(path)]
    assert ungrouped[0] & ungrouped[1]
    write(tmp_path / "b.jsonl", records(3))
    with pytest.raises(ValueError, match=r"b.jsonl:1: no column 'day'"):
        sides(tmp_path / "b.jsonl", Columns(group="day"))


@pytest.mark.parametrize("query", [None, "queries"])
def test_documents_with_one_id_are_in_one_split_with_a_group_column_too(tmp_path, query):
    queries = [{"query": "q", "summary": "s"}, {"query": "r", "summary": "t"}]
    found = [
        record | {"id": f"story {i // 5}", "topic": f"topic {i}", "queries": queries}
        for i, record in enumerate(records(200))
    ]
    path = write(tmp_path / "a.jsonl", found)
    stories = [
        {int(text.split()[1]) // 5 for text in side} for side in sides(path, Columns(group="topic", query=query))
    ]
    assert stories[1]
    assert not stories[0] & stories[1]


def test_documents_linked_by_text_or_id_are_in_one_split_in_any_order():
    links = [("a", "1"), ("b", "2"), ("a", "2"), ("c", "3"), ("d", "3"), ("e", "4"), ("d", "5")]
    rows = [Row(name, [text], ["s"], name) for name, text in links]
    for share in (0.2, 0.5, 0.8):
        expected = held_out_texts(rows, share, "x")
        assert held_out_texts(rows[::-1], share, "x") == expected
        parts = [{Row("", [text], []).digest() for text in texts} for texts in (("1", "2"), ("3", "5"), ("4",))]
        assert all(part <= expected or not part & expected for part in parts)


def test_the_held_out_share_is_close_to_the_requested_share():
    rows = [Row(f"d{number}", [f"text {number}"], ["s"], f"d{number}") for number in range(2000)]
    shares = [len(held_out_texts(rows, share, "x")) / 2000 for share in (0.02, 0.1, 0.25, 0.5)]
    assert shares == pytest.approx([0.02, 0.1, 0.25, 0.5], abs=0.03)
