"""Requirements on a record."""

import pytest

from recurrent_bart.data.rows import Columns, make_row, split_of

SECTIONS = {"id": "d", "sections": ["a", "b", "c", "d", "e"], "summaries": ["", None, "C", " ", "E"]}


def test_a_row_has_the_document_and_its_summary():
    row = make_row({"id": 7, "document": "text", "summary": "s"}, "document", Columns(), "f:1")
    assert (row.id, row.sections, row.summaries) == ("7", ["text"], ["s"])


@pytest.mark.parametrize("name", [{}, {"id": None}, {"id": ""}])
def test_a_record_without_an_id_is_named_by_file_and_line(name):
    row = make_row(name | {"document": "text", "summary": "s"}, "document", Columns(), "/some/folder/f.jsonl:1")
    assert row.id == "f.jsonl:1"


REFERENCES = Columns(references="more")


def test_further_references_stand_beside_the_target():
    record = {"document": "text", "summary": "s", "more": ["t", None, " ", "u"]}
    row = make_row(record, "document", REFERENCES, "f:1")
    assert (row.summaries, row.references) == (["s"], [["t", "u"]])
    assert make_row(record, "document", Columns(), "f:1").references == []
    assert make_row(record | {"more": None}, "document", REFERENCES, "f:1").references == []


def test_without_a_summary_the_first_reference_is_the_target():
    row = make_row({"document": "text", "more": ["t", "u"]}, "document", REFERENCES, "f:1")
    assert (row.summaries, row.references) == (["t"], [["u"]])


def test_sections_have_their_own_references():
    record = SECTIONS | {"more": [None, [], ["F"], ["lost"], ["G", "H"]]}
    row = make_row(record, "sections", REFERENCES, "f:1")
    assert (row.summaries, row.references) == (["", "C", "", "E"], [[], ["F"], [], ["G", "H"]])
    row = make_row(SECTIONS | {"more": None}, "sections", REFERENCES, "f:1")
    assert (row.summaries, row.references) == (["", "C", "", "E"], [[], [], [], []])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("document", {}, "f:1: no column 'more'"),
        ("document", {"more": "t"}, "f:1: column 'more' must be a list of texts"),
        ("document", {"more": ["\ud800"]}, "f:1: the text has half a character"),
        ("sections", {}, "f:1: no column 'more'"),
        ("sections", {"more": [["t"]]}, "f:1: column 'more' must be a list with one list of texts for each of the 5 "),
        ("sections", {"more": [["t"], "u", [], [], []]}, "f:1: column 'more' must be a list of texts"),
    ],
)
def test_unusable_references_are_refused(task, change, message):
    with pytest.raises(ValueError, match=message):
        make_row({"document": "text", "summary": "s"} | SECTIONS | change, task, REFERENCES, "f:1")


def test_0_is_an_id():
    assert make_row({"id": 0, "document": "text", "summary": "s"}, "document", Columns(), "f:1").id == "0"


def test_columns_may_have_other_names():
    columns = Columns(text="article", summary="abstract")
    row = make_row({"article": "text", "abstract": "s", "document": "no"}, "document", columns, "f:1")
    assert (row.sections, row.summaries) == (["text"], ["s"])


def test_neighbouring_sections_without_a_target_are_joined_and_final_ones_dropped():
    record = SECTIONS | {"sections": [*"abcdef"], "summaries": ["", None, "C", " ", "E", ""]}
    row = make_row(record, "sections", Columns(), "f:1")
    assert row.sections == ["a\nb", "c", "d", "e"]
    assert row.summaries == ["", "C", "", "E"]


def test_a_document_is_joined_from_its_sections():
    row = make_row(SECTIONS, "document", Columns(), "f:1")
    assert (row.sections, row.summaries) == (["a\nb\nc\nd\ne"], ["C   E"])


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        ({"text": "t", "summary": "s"}, "document", "columns are 'text', 'summary'; choose with --text_column"),
        ({}, "document", "f:3: no column 'document'; the columns are none; choose with --text_column"),
        ({"document": None, "summary": "s"}, "document", "f:3: column 'document' has no value"),
        ({"document": " \n", "summary": "s"}, "document", "f:3: the document is empty"),
        ({"document": "t", "summary": " "}, "document", "f:3: the summary is empty"),
        (
            {"document": "t"},
            "document",
            "f:3: no column 'summary'; the columns are 'document'; choose with --summary_co",
        ),
        ({"document": ["t"], "summary": "s"}, "document", r"'document' must be a text, not list \(--text_column\)"),
        ({"document": "t", "summary": "s"}, "sections", "f:3: no column 'sections'; .*; choose with --sections_column"),
        ({"sections": ["t"]}, "sections", "f:3: no column 'summaries'; .*; choose with --summaries_column"),
        ({"sections": "t", "summaries": ["s"]}, "sections", "f:3: column 'sections' must be a list of texts"),
        ({"sections": ["t"], "summaries": [3]}, "sections", "f:3: column 'summaries' must be a list of texts"),
        ({"sections": ["t", "u"], "summaries": ["s"]}, "sections", "f:3: 2 sections but 1 summaries"),
        ({"sections": ["t"], "summaries": [""]}, "sections", "f:3: the summary is empty"),
        ({"document": "t \ud800", "summary": "s"}, "document", "f:3: the text has half a character"),
        ({"sections": ["t"], "summaries": ["\udfff"]}, "sections", "f:3: the text has half a character"),
    ],
)
def test_unusable_records_are_refused_with_their_place(record, task, message):
    with pytest.raises(ValueError, match=message):
        make_row(record, task, Columns(), "f:3")


def test_the_split_depends_only_on_the_id():
    splits = [split_of(f"module.{number}") for number in range(2000)]
    assert splits == [split_of(f"module.{number}") for number in range(2000)]
    assert {split: round(splits.count(split) / 2000, 1) for split in set(splits)} == {
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }
