"""JSON files with a list of objects, or an error with file and line. Tests of sources read JSON Lines."""

import json

import pytest

from recurrent_bart.data.jsonl import json_records

RECORDS = [{"document": "a [1], {b}", "summary": "é"}, {"document": "c\nd", "summary": "]"}]


def read(path, **options):
    return [(place.rsplit("/")[-1], record) for place, record in json_records(path, **options)]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_list_is_read_as_it_was_written(tmp_path, indent, encoding):
    path = tmp_path / "x.json"
    path.write_bytes((" \n" + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n\n").encode(encoding))
    found = read(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding)
    assert [record for _, record in found] == RECORDS
    lines = {None: ("2", "2"), 0: ("3", "7"), 2: ("3", "7")}[indent]
    assert [place for place, _ in found] == [f"x.json:{line}" for line in lines]


def test_an_empty_list_has_no_records(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[ \n ]\n")
    assert read(path) == []


@pytest.mark.parametrize(
    "text", ['{"document": "t"}\n{"document": "u"}\n', '\n\n{"document": "t"}\n\n{"document": "u"}']
)
def test_a_file_without_a_list_is_read_as_json_lines(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert [record["document"] for _, record in read(path)] == ["t", "u"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"document": "t"},\n{"document": \n]', 4),
        ('[\n{"document": "t"}\n{"document": "u"}]', 2),
        ('[\n{"document": "t"},\n]', 3),
        ('[\n{"document": "t"},\n\n', 4),
        ('[\n{"document": "t"}', 2),
        ('[{"document": "t"}]\n{"document": "u"}', 2),
        ("[", 1),
    ],
)
def test_wrong_json_is_refused_with_its_line_also_if_bad_samples_are_skipped(tmp_path, text, line):
    path = tmp_path / "x.json"
    path.write_text(text)
    for options in ({}, {"on_bad": lambda error: None}):
        with pytest.raises(ValueError, match=rf"x.json:{line}: unreadable list of objects"):
            read(path, **options)


def test_an_element_that_is_no_object_or_cannot_be_decoded_may_be_skipped(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('[{"document": "t"},\n[1, "a"],\n{"document": "é"},\n{"document": "u"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x.json:2: unreadable object \(must be a JSON object, not list\)"):
        read(path)
    errors = []
    assert read(path, on_bad=errors.append) == [("x.json:1", {"document": "t"}), ("x.json:4", {"document": "u"})]
    assert [str(error).split("x.json")[1][:3] for error in errors] == [":2:", ":3:"]
    assert "byte 0xe9 is not utf-8; give the encoding of the file with --encoding" in str(errors[1])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("twice", ['{"a": 1, "a": 2}', '{"turns": [{"text": "b", "text": "c"}]}'])
def test_a_repeated_key_is_refused_with_its_line_and_may_be_skipped(tmp_path, name, twice):
    path = tmp_path / name
    lines = ['{"a": 0}', twice, '{"a": 3}']
    path.write_text("[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines))
    with pytest.raises(ValueError, match=rf"{name}:2: unreadable .*the key '(a|text)' is repeated"):
        list(json_records(path))
    errors = []
    assert [record for _, record in json_records(path, errors.append)] == [{"a": 0}, {"a": 3}]
    assert len(errors) == 1
