"""Files of a data set's folder are read, or a note names them."""

import json

import pytest

from recurrent_bart.data.rows import Columns
from recurrent_bart.data.sources import find_sources


def write(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"document": f"text {number}", "summary": f"s {number}"} for number in numbers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_pair(folder, name, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}{suffix}").write_text(f"text {name}")
    (folder / f"{name}.summary{suffix}").write_text(f"summary {name}")


def texts(source):
    return [row.sections[0] for row in source.rows("document", Columns())]


def notes(sources):
    return [note for source in sources.values() for note in source.notes]


@pytest.mark.parametrize("name", ["val", "valid", "dev", "eval", "validation", "Validation", "VAL"])
def test_a_validation_split_has_many_names(tmp_path, name):
    write(tmp_path / "Train.jsonl", 0, 1)
    write(tmp_path / f"{name}.JSONL", 2)
    sources = find_sources(str(tmp_path))
    assert texts(sources["train"]) == ["text 0", "text 1"]
    assert texts(sources["validation"]) == ["text 2"]
    assert notes(sources) == []


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "train_2.jsonl", "train_10.jsonl"),
        ("train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"),
    ],
)
def test_numbered_files_of_a_split_are_read_in_order_of_their_numbers(tmp_path, names):
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    write(tmp_path / "val.jsonl", 9)
    sources = find_sources(str(tmp_path))
    assert texts(sources["train"]) == ["text 0", "text 1", "text 2"]
    before = sources["train"].identity()
    write(tmp_path / names[1], 1, 5)
    assert find_sources(str(tmp_path))["train"].identity() != before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.jsonl", "train.jsonl.gz"), "files of split 'train' may be copies of each other"),
        (("train.jsonl", "train_2.csv"), "files of split 'train' may be copies of each other"),
        (
            ("train.jsonl", "val.jsonl", "dev.jsonl"),
            "of each other: dev.jsonl, val.jsonl; keep one of them, or number files of one type",
        ),
        (("train.jsonl", "train/a.summary.txt"), "files of split 'train' may be copies of each other"),
        (("train-00000-of-00002.jsonl",), "split 'train' has only 1 of 2 files"),
    ],
)
def test_files_that_may_be_copies_or_are_missing_are_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, 0)
    with pytest.raises(ValueError, match=message):
        find_sources(str(tmp_path))


def test_unread_files_are_named_in_one_line(tmp_path):
    write(tmp_path / "train.jsonl", 0, 1)
    write(tmp_path / "val.jsonl", 0)
    for name in ("extra.jsonl", "train.xlsx", "README.md", ".hidden", "LICENSE"):
        (tmp_path / name).write_text("x")
    assert notes(find_sources(str(tmp_path))) == [f"{tmp_path}: not read: extra.jsonl, train.xlsx"]


def test_linked_folders_are_read_once(tmp_path):
    write_pair(tmp_path / "data" / "train", "a")
    write_pair(tmp_path / "archive" / "2023", "b")
    write_pair(tmp_path / "data" / "val", "c")
    (tmp_path / "data" / "train" / "2023").symlink_to(tmp_path / "archive" / "2023")
    # One folder that is reachable twice, and one that contains itself.
    (tmp_path / "data" / "train" / "again").symlink_to(tmp_path / "archive" / "2023")
    (tmp_path / "archive" / "2023" / "loop").symlink_to(tmp_path / "archive")
    sources = find_sources(str(tmp_path / "data"))
    assert texts(sources["train"]) == ["text b", "text a"]
    before = sources["train"].identity()
    write_pair(tmp_path / "archive" / "2023", "d")
    assert find_sources(str(tmp_path / "data"))["train"].identity() != before


def test_a_broken_link_is_an_unreadable_text(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    source = find_sources("stdlib", train_file=str(tmp_path), validation_file=str(tmp_path))["train"]
    assert source.identity()
    with pytest.raises(ValueError, match=r"b.txt: unreadable"):
        texts(source)


def test_file_names_in_capitals_are_found_and_texts_without_a_summary_are_named(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "c", suffix=".TXT")
    (tmp_path / "alone.txt").write_text("text")
    (tmp_path / "table.xlsx").write_text("x")
    sources = find_sources("stdlib", train_file=str(tmp_path), validation_file=str(tmp_path))
    assert texts(sources["train"]) == ["text a", "text c"]
    assert sources["train"].notes == (
        f"{tmp_path}: not read: 1 texts without a summary: alone",
        f"{tmp_path}: not read: table.xlsx",
    )


def test_the_error_for_a_folder_without_documents_names_its_files(tmp_path):
    write(tmp_path / "papers.jsonl", 0)
    with pytest.raises(ValueError, match=r"no train.* the folder has papers.jsonl"):
        find_sources(str(tmp_path))


def test_a_text_in_a_different_encoding_is_named(tmp_path):
    write_pair(tmp_path, "a")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    source = find_sources("stdlib", train_file=str(tmp_path), validation_file=str(tmp_path))["train"]
    with pytest.raises(
        ValueError, match=r"a.txt: unreadable \(byte 0xe9 is not utf-8; give the encoding of the file with --encoding"
    ):
        texts(source)
