"""Requirements on a record."""

import pytest

from recurrent_bart.data.rows import Columns, make_row, split_of, split_queries

SECTIONS = {"id": "d", "sections": ["a", "b", "c", "d", "e"], "summaries": ["", None, "C", " ", "E"]}


def test_a_row_has_the_document_and_its_summary():
    row = make_row({"id": 7, "document": "text", "summary": "s"}, "document", Columns(), "f:1")
    assert (row.id, row.sections, row.summaries) == ("7", ["text"], ["s"])


@pytest.mark.parametrize("task", ["document", "denoise"])
@pytest.mark.parametrize("document", ["text", "text\n", "text \t\n\n"])
def test_a_document_ends_without_white_space(document, task):
    assert make_row({"document": document, "summary": "s"}, task, Columns(), "f:1").sections == ["text"]


@pytest.mark.parametrize("name", [{}, {"id": None}, {"id": ""}, {"id": " "}, {"id": float("nan")}])
def test_a_record_without_an_id_is_named_by_file_and_line(name):
    row = make_row(name | {"document": "text", "summary": "s"}, "document", Columns(), "/some/folder/f.jsonl:1")
    assert (row.id, row.record_id) == ("f.jsonl:1", None)


REFERENCES = Columns(references="more")


def test_further_references_stand_beside_the_target():
    record = {"document": "text", "summary": "s", "more": ["t", None, " ", "u"]}
    row = make_row(record, "document", REFERENCES, "f:1")
    assert (row.summaries, row.references) == (["s"], [["t", "u"]])
    assert make_row(record, "document", Columns(), "f:1").references == []
    assert make_row(record | {"more": None}, "document", REFERENCES, "f:1").references == []


@pytest.mark.parametrize("summary", [{}, {"summary": None}, {"summary": " "}, {"summaries": [""]}, {"summary": []}])
def test_without_a_summary_the_first_reference_is_the_target(summary):
    row = make_row({"document": "text", "more": ["t", "u"]} | summary, "document", REFERENCES, "f:1")
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


@pytest.mark.parametrize("group", [None, "", "  ", float("nan")])
def test_a_group_without_a_value_is_refused(group):
    record = {"document": "text", "summary": "s", "day": group}
    with pytest.raises(ValueError, match="f:3: column 'day' has no value"):
        make_row(record, "document", Columns(group="day"), "f:3")
    assert make_row(record | {"day": 0}, "document", Columns(group="day"), "f:3").group == "0"


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
    assert (row.section_indices, row.n_sections) == ([0, 2, 3, 4], 6)


def test_sections_keep_their_index_in_the_record():
    record = {"sections": ["a", " ", "c", "d", "", "f"], "summaries": ["", "", "C", "", "", "F"]}
    row = make_row(record, "sections", Columns(), "f:1")
    assert (row.sections, row.summaries) == (["a", "c", "d", "f"], ["", "C", "", "F"])
    assert (row.section_indices, row.n_sections) == ([0, 2, 3, 5], 6)


def test_the_digest_is_that_of_the_whole_text_whatever_the_targets():
    texts = ["A caf\u00e9", "b", " ", "c"]
    summaries = [["S", "", "", ""], ["", "S", None, ""], ["", "", "", "S"], ["S", "T", "", "U"]]
    rows = [make_row({"sections": texts, "summaries": own}, "sections", Columns(), "f:1") for own in summaries]
    assert rows[0].sections == [texts[0]]
    rows += [make_row({"document": "A cafe\u0301  b\nc", "summary": "S"}, "document", Columns(), "f:1")]
    assert len({row.digest() for row in rows}) == 1
    other = make_row({"sections": [*texts, "\ud800"], "summaries": [*summaries[0], ""]}, "sections", Columns(), "f:1")
    assert other.digest() != rows[0].digest()


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
        ({"document": 3, "summary": "s"}, "document", r"'document' must be a text, .*, not int \(--text_column\)"),
        ({"document": [["t"]], "summary": "s"}, "document", "f:3: column 'document' must be .*item 1 of .* type list"),
        ({"document": [], "summary": "s"}, "document", "f:3: the document is empty"),
        ({"document": "t", "summary": [" "]}, "document", "f:3: the summary is empty"),
        ({"sections": [["t", 3]], "summaries": ["s"]}, "sections", "f:3: .*'sections' .*item 1 must .*item 2 of .*int"),
        ({"sections": [["t"], []], "summaries": [[], []]}, "sections", "f:3: the summary is empty"),
        ({"sections": ["t"], "summaries": [[["s"]]]}, "sections", "f:3: column 'summaries' .*type list"),
        (
            {"document": [{"speaker": "A"}], "summary": "s"},
            "document",
            "f:3: .* turn with no text: turn 1, .*'speaker'",
        ),
        ({"document": "t", "summary": "s"}, "sections", "f:3: no column 'sections'; .*; choose with --sections_column"),
        ({"sections": ["t"]}, "sections", "f:3: no column 'summaries'; .*; choose with --summaries_column"),
        ({"sections": "t", "summaries": ["s"]}, "sections", "f:3: column 'sections' must be a list of texts"),
        ({"sections": ["t"], "summaries": [3]}, "sections", "f:3: column 'summaries' must be a list of texts"),
        ({"sections": ["t", "u"], "summaries": ["s"]}, "sections", "f:3: 2 sections but 1 summaries"),
        ({"sections": ["t"], "summaries": [""]}, "sections", "f:3: the summary is empty"),
        ({"sections": ["x", "", "y"], "summaries": ["A", "B", "C"]}, "sections", "f:3: section 2 is empty but has a "),
        ({"sections": [" "], "summaries": ["A"]}, "sections", "f:3: section 1 is empty but has a summary"),
        ({"document": "t \ud800", "summary": "s"}, "document", "f:3: the text has half a character"),
        ({"sections": ["t"], "summaries": ["\udfff"]}, "sections", "f:3: the text has half a character"),
        ({"id": "a\ud800", "document": "t", "summary": "s"}, "document", "f:3: the id has half a character"),
        ({"id": "\udfff", "sections": ["t"], "summaries": ["s"]}, "sections", "f:3: the id has half a character"),
        ({"id": "\udfff", "document": "t"}, "denoise", "f:3: the id has half a character"),
    ],
)
def test_unusable_records_are_refused_with_their_place(record, task, message):
    with pytest.raises(ValueError, match=message):
        make_row(record, task, Columns(), "f:3")


def test_a_group_with_half_a_character_is_refused():
    record = {"document": "t", "summary": "s", "book": "\ud800"}
    with pytest.raises(ValueError, match="f:3: the group has half a character"):
        make_row(record, "document", Columns(group="book"), "f:3")


def test_sentences_and_turns_are_joined_in_both_tasks():
    turns = [{"speaker": "議長", "text": "開会します。"}, {"speaker": "B", "text": "Yes."}]
    record = {
        "document": turns,
        "summary": ["One.", "Two."],
        "sections": [["a.", "b."], turns],
        "summaries": [["S."], []],
    }
    row = make_row(record, "document", Columns(), "f:1")
    assert (row.sections, row.summaries) == (["議長: 開会します。\nB: Yes."], ["One. Two."])
    row = make_row(record | {"summaries": [[], ["S.", "T."]]}, "sections", Columns(), "f:1")
    assert (row.sections, row.summaries) == (["a. b.", "議長: 開会します。\nB: Yes."], ["", "S. T."])


def test_a_reference_may_be_a_list_of_sentences():
    record = {"document": "text", "summary": "s", "more": ["t", ["u.", "v."]]}
    assert make_row(record, "document", REFERENCES, "f:1").references == [["t", "u. v."]]


QUERY = Columns(query="question")


def test_a_question_stands_beside_the_text():
    record = {"document": "text", "summary": "s", "question": " why? ", "sections": ["a"], "summaries": ["S"]}
    assert make_row(record, "document", QUERY, "f:1").query == "why?"
    assert make_row(record, "sections", QUERY, "f:1").query == "why?"
    assert make_row(record, "document", Columns(), "f:1").query == ""
    assert make_row(record | {"question": None}, "document", QUERY, "f:1").query == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "f:3: no column 'question'; the columns are 'document', 'summary'; choose with --query_column"),
        ({"question": 3}, r"f:3: column 'question' must be a text, not int \(--query_column\)"),
        ({"question": "\ud800"}, "f:3: the text has half a character"),
    ],
)
def test_unusable_questions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_row({"document": "text", "summary": "s"} | change, "document", QUERY, "f:3")


def test_each_question_of_a_list_has_its_own_summary():
    questions = [{"query": "q", "summary": "A", "kind": "k"}, {"query": "r"}]
    record = {"id": "d", "document": "t", "summary": "whole", "summaries": ["no"], "question": questions}
    found = split_queries(record, "document", QUERY, "f:1")
    assert found == [
        ({"id": "d", "document": "t", "summary": "A", "question": "q"}, " (query 1)"),
        ({"id": "d", "document": "t", "question": "r"}, " (query 2)"),
    ]
    with pytest.raises(ValueError, match="f:1: no column 'summary'"):
        make_row(found[1][0], "document", QUERY, "f:1")
    assert split_queries(record, "document", Columns(), "f:1") == [(record, "")]
    for bad, message in (([], "not an empty list"), (["q"], "item 1"), ([questions[0], {"question": "q"}], "item 2")):
        with pytest.raises(
            ValueError, match=f"f:1: column 'question' must be a text, or a list of objects .*{message}"
        ):
            split_queries({"question": bad}, "document", QUERY, "f:1")


def test_the_split_depends_only_on_the_id():
    splits = [split_of(f"module.{number}") for number in range(2000)]
    assert splits == [split_of(f"module.{number}") for number in range(2000)]
    assert {split: round(splits.count(split) / 2000, 1) for split in set(splits)} == {
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }
