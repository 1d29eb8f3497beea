"""Files, folders and named data sets as sources, and their error messages."""

import csv
import gzip
import json
import os
import struct
from dataclasses import fields, replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from recurrent_bart.data.held_out import HeldOut
from recurrent_bart.data.rows import Columns
from recurrent_bart.data.sources import Source, find_sources, read_records

RECORDS = [{"id": f"d{i}", "document": f"text {i}", "summary": f"sum {i}"} for i in range(3)]


def write(path, records=RECORDS):
    """Write records in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        for record in records:
            (path / f"{record['id']}.txt").parent.mkdir(parents=True, exist_ok=True)
            (path / f"{record['id']}.txt").write_text(record["document"])
            (path / f"{record['id']}.summary.txt").write_text(record["summary"])
    return path


def read(source, task="document"):
    return [(row.id, row.sections[0], row.summaries[0]) for row in source.rows(task, Columns())]


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.jsonl.gz", "train.json", "train.csv", "train.tsv", "train.parquet", "train"]
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "validation.jsonl", RECORDS[:1])
    sources = find_sources(str(tmp_path))
    assert read(sources["train"]) == [(f"d{i}", f"text {i}", f"sum {i}") for i in range(3)]
    assert read(sources["validation"]) == [("d0", "text 0", "sum 0")]
    assert "test" not in sources


def test_a_data_set_of_several_splits_saved_to_disk_is_read(tmp_path):
    splits = {"train": RECORDS, "dev": RECORDS[:1], "extra": RECORDS}
    DatasetDict({name: Dataset.from_list(records) for name, records in splits.items()}).save_to_disk(tmp_path / "data")
    sources = find_sources(str(tmp_path / "data"))
    assert {split: source.kind for split, source in sources.items()} == {"train": "saved", "validation": "saved"}
    assert read(sources["train"]) == [(f"d{i}", f"text {i}", f"sum {i}") for i in range(3)]
    assert read(sources["validation"]) == [("d0", "text 0", "sum 0")]
    assert sources["train"].notes == (f"{tmp_path / 'data'}: not read: extra",)
    with pytest.raises(
        ValueError, match=r"data: a data set with the splits dev, extra, train; give the folder of one split"
    ):
        find_sources("stdlib", train_file=str(tmp_path / "data"))


def test_a_data_set_of_one_split_saved_to_disk_is_read_and_some_documents_are_held_out(tmp_path):
    folder = tmp_path / "data"
    records = [{"id": f"d{i}", "sections": [f"text {i}", "b"], "summaries": ["s", "t"]} for i in range(100)]
    Dataset.from_list(records).with_format("numpy").save_to_disk(folder, num_shards=2)
    sources = find_sources(str(folder))
    train, validation = read(sources["train"], "sections"), read(sources["validation"], "sections")
    assert sorted(train + validation) == sorted((f"d{i}", f"text {i}", "s") for i in range(100))
    assert 3 < len(validation) < 30
    before = sources["train"].identity()
    (folder / "cache-1.arrow").write_bytes(b"")
    assert find_sources(str(folder))["train"].identity() == before
    named = find_sources("stdlib", train_file=str(folder), validation_file=str(write(tmp_path / "v.jsonl")))
    assert len(read(named["train"], "sections")) == 100


@pytest.mark.parametrize(
    ("name", "content"), [("state.json", "{"), ("data-00000-of-00001.arrow", "not arrow"), ("state.json", "{}")]
)
def test_a_damaged_data_set_on_disk_is_refused(tmp_path, name, content):
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / name).write_text(content)
    with pytest.raises(ValueError, match="data: unreadable"):
        read(find_sources("stdlib", train_file=str(tmp_path / "data"))["train"])


def test_a_document_of_a_saved_data_set_is_named_by_its_number(tmp_path):
    Dataset.from_list([*RECORDS, {"id": "d3", "document": "text", "summary": None}]).save_to_disk(tmp_path / "data")
    source = find_sources("stdlib", train_file=str(tmp_path / "data"))["train"]
    with pytest.raises(ValueError, match=r"data\[3\]: column 'summary' has no value"):
        list(source.rows("document", Columns()))


def test_files_may_be_named_one_by_one(tmp_path):
    train, test = write(tmp_path / "a.csv"), write(tmp_path / "b.parquet", RECORDS[1:])
    sources = find_sources("stdlib", train_file=str(train), validation_file=str(test), test_file=str(test))
    assert len(read(sources["train"])) == 3
    assert len(read(sources["validation"])) == len(read(sources["test"])) == 2


def test_sections_are_read_from_lists(tmp_path):
    record = {"sections": ["a", "b"], "summaries": ["A", "B"]}
    other = {"sections": ["c"], "summaries": ["C"]}
    for name in ("x.jsonl", "x.parquet"):
        path = write(tmp_path / name, [record, other])
        source = find_sources("stdlib", train_file=str(path), validation_file=str(path))["train"]
        assert next(source.rows("sections", Columns())).sections == ["a", "b"]


@pytest.mark.parametrize("name", ["documents.jsonl", "folder"])
def test_without_a_validation_split_some_documents_are_held_out(tmp_path, name):
    records = [{"id": f"d{i}", "document": f"text {i}", "summary": "s"} for i in range(200)]
    sources = find_sources(str(write(tmp_path / name, records)))
    train, validation = read(sources["train"]), read(sources["validation"])
    assert len(train) + len(validation) == 200
    assert not set(train) & set(validation)
    assert 5 <= len(validation) <= 40


def test_a_data_set_by_name_is_loaded_by_datasets(tmp_path, monkeypatch):
    """The library `datasets` loads a local folder like a repository of the hub; our code must not see the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    held_out = RECORDS[0] | {"id": "d12", "document": "held out"}
    write(tmp_path / "owner" / "name" / "data" / "train.parquet", [*RECORDS, held_out])
    write(tmp_path / "owner" / "name" / "data" / "test.parquet", RECORDS[:1])
    with monkeypatch.context() as patch:
        patch.setattr("recurrent_bart.data.sources.Path.exists", lambda self: False)
        sources = find_sources("owner/name")
    assert {split: source.kind for split, source in sources.items()} == dict.fromkeys(sources, "hub")
    assert read(sources["test"]) == [("d0", "text 0", "sum 0")]
    assert [name for name, *_ in read(sources["train"])] == ["d0", "d1", "d2"]
    assert [name for name, *_ in read(sources["validation"])] == ["d12"]
    assert sources["test"].identity() != sources["train"].identity()


def test_a_configuration_of_a_data_set_by_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    configs = []
    for name, records in (("short", RECORDS[:1]), ("long", RECORDS)):
        files = {split: f"{name}/{split}.parquet" for split in ("train", "validation")}
        for file in files.values():
            write(tmp_path / "owner" / "name" / file, records)
        data_files = [{"split": split, "path": file} for split, file in files.items()]
        configs.append({"config_name": name, "data_files": data_files})
    # JSON is YAML too.
    (tmp_path / "owner" / "name" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with monkeypatch.context() as patch:
        patch.setattr("recurrent_bart.data.sources.Path.exists", lambda self: False)
        short, long = (find_sources("owner/name", config_name=name)["train"] for name in ("short", "long"))
    assert len(read(short)) == 1
    assert len(read(long)) == 3
    assert short.identity() != long.identity()
    monkeypatch.setattr("recurrent_bart.data.sources.Path.exists", lambda self: False)
    with pytest.raises(
        ValueError, match=r"--dataset owner/name: .*'short', 'long'.*give one with --dataset_config_name"
    ):
        find_sources("owner/name")
    with pytest.raises(ValueError, match=r"--dataset owner/name --dataset_config_name no: .*'no' not found"):
        find_sources("owner/name", config_name="no")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "x.jsonl: the file is empty"),
        ("x.jsonl", "\n \n", "no documents with a target for --task document in split 'train'"),
        ("x.jsonl", '{"document": "t", "summary": "s"}\n{"document": \n', r"x.jsonl:2: unreadable line"),
        ("x.jsonl", '{"document": "t", "summary": "s"}\n[1]\n', r"x.jsonl:2: .*must be a JSON object, not list"),
        ("x.jsonl", '{"document": "t"}\n', "x.jsonl:1: no column 'summary'"),
        ("x.csv", "document,summary\nt,s\nu,\n", "x.csv:3: the summary is empty"),
        ("x.csv", "text,summary\nt,s\n", "x.csv:2: no column 'document'; the columns are 'text', 'summary'"),
        ("x.tsv", "document\tsummary\nt\ts\nu\n", "x.tsv:3: 1 fields, but the first row names 2 columns"),
        ("x.json", '[{"document": "t", "summary": "s"},\n{"document": "u"}]', "x.json:2: no column 'summary'"),
        ("x.json", "[]", "no documents with a target for --task document in split 'train'"),
        ("x.xml", "<a/>", "x.xml: unknown file type"),
        ("x.jsonl.gz", "not gzip", "x.jsonl.gz:1: unreadable"),
        ("x.parquet", "not parquet", "x.parquet: "),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(
            find_sources("stdlib", train_file=str(path), validation_file=str(path))["train"].rows("document", Columns())
        )


@pytest.mark.parametrize(("name", "kind"), [("x.csv", "a CSV or TSV file"), ("texts", "a folder of text files")])
def test_files_without_lists_are_refused_for_sections(tmp_path, name, kind):
    place = tmp_path / name
    if name == "texts":
        place.mkdir()
        (place / "a.txt").write_text("text")
        (place / "a.summary.txt").write_text("summary")
    else:
        place.write_text("document,summary\nt,s\n")
    source = find_sources("stdlib", train_file=str(place))["train"]
    with pytest.raises(
        ValueError, match=f"{name}: --task sections needs lists of texts, and {kind} has no lists; give"
    ):
        list(source.rows("sections", Columns()))


def test_truncated_gzip_is_refused_with_its_line(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", RECORDS * 500)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x.jsonl.gz:\d+: unreadable"):
        read(find_sources("stdlib", train_file=str(path))["train"])


def test_corrupt_gzip_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", RECORDS * 500)
    data = bytearray(path.read_bytes())
    data[100:140] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.jsonl.gz:\d+: unreadable"):
        read(find_sources("stdlib", train_file=str(path))["train"])


def test_a_line_that_is_not_utf8_is_refused_with_its_number(tmp_path):
    path = write(tmp_path / "x.jsonl", RECORDS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"text", "té".encode("latin-1")) + lines[2])
    with pytest.raises(ValueError, match=r"x.jsonl:2: unreadable line"):
        read(find_sources("stdlib", train_file=str(path), validation_file=str(path))["train"])


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_a_byte_order_mark_is_not_part_of_a_document(tmp_path, name):
    path = write(tmp_path / name, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(find_sources("stdlib", train_file=str(path), validation_file=str(path))["train"])[0][0] == "d0"


def test_the_held_out_documents_do_not_depend_on_the_folder_of_the_file(tmp_path, monkeypatch):
    """Training and a later evaluation may start in different folders."""
    records = [{"document": f"text {i}", "summary": "s"} for i in range(100)]
    path = write(tmp_path / "data" / "x.csv", records)
    monkeypatch.chdir(tmp_path)
    validation = read(find_sources("data/x.csv")["validation"])
    assert 3 < len(validation) < 30
    assert read(find_sources(str(path))["validation"]) == validation


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        find_sources("stdlib", train_file=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="no such file or folder"):
        find_sources(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no such file or folder, and no data set could be loaded"):
        find_sources("no-such-data-set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no train"):
        find_sources(str(tmp_path / "empty"))


def test_two_files_for_one_split_are_refused(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.csv")
    with pytest.raises(ValueError, match="files of split 'train' may be copies of each other"):
        find_sources(str(tmp_path))


# for each field of a source: another value
OTHER = {
    "place": "owner/other",
    "split": "validation",
    "hub_split": "train[:50%]",
    "held_out": HeldOut(0.3),
    "skips_bad": True,
    "n_made": 2,
    "encoding": "latin-1",
    "config_name": "long",
}


@pytest.fixture
def builder(monkeypatch):
    """Replace the builder of a named data set."""
    found = SimpleNamespace(info=SimpleNamespace(version="1.0.0"), hash="a0")
    monkeypatch.setattr("recurrent_bart.data.sources.load_dataset_builder", lambda name, config=None: found)
    return found


def test_each_field_of_a_source_makes_it_another_one(builder, tmp_path):
    # the kind is part of each identity, notes do not change the documents, and texts without summaries are other files
    assert OTHER.keys() | {"kind", "files", "notes", "needs_summary"} == {item.name for item in fields(Source)}
    hub = Source("hub", "owner/name", "train", hub_split="train", held_out=HeldOut(0.1))
    file = Source("file", "x", "train", (write(tmp_path / "x.jsonl"),), held_out=HeldOut(0.1))
    assert replace(hub, notes=("a",)).identity() == hub.identity()
    for source, names in ((hub, OTHER), (file, OTHER.keys() - {"place", "hub_split", "config_name"})):
        changed = [replace(source, **{name: OTHER[name]}).identity() for name in names]
        changed.append(replace(source, held_out=HeldOut(0.1, "line")).identity())
        changed.append(replace(source, held_out=None).identity())
        assert all(changed.count(one) == 1 and one != source.identity() for one in changed)


def test_another_version_or_script_of_a_named_data_set_is_another_one(builder):
    source = Source("hub", "owner/name", "train", hub_split="train")
    before = source.identity()
    builder.hash = "b1"
    assert source.identity() != before
    builder.hash, builder.info.version = "a0", "1.0.1"
    assert source.identity() != before
    builder.info.version = "1.0.0"
    assert source.identity() == before


def test_each_file_that_is_read_makes_a_source_another_one(tmp_path):
    write(tmp_path / "folder")
    for name in ("train_1.jsonl", "train_2.jsonl"):
        write(tmp_path / name)
    folder = Source("folder", str(tmp_path / "folder"), "train")
    shards = Source("file", "x", "train", (tmp_path / "train_1.jsonl", tmp_path / "train_2.jsonl"))
    for source, changed in (
        (folder, tmp_path / "folder" / "d1.txt"),
        (folder, tmp_path / "folder" / "d1.summary.txt"),
        (shards, tmp_path / "train_1.jsonl"),
        (shards, tmp_path / "train_2.jsonl"),
    ):
        before = source.identity()
        # the same size, but newer
        os.utime(changed, ns=(0, 10**18))
        assert source.identity() != before
        before = source.identity()
        changed.write_text(changed.read_text() + " ")
        os.utime(changed, ns=(0, 10**18))
        assert source.identity() != before


def test_identity_changes_with_the_file(tmp_path):
    path = write(tmp_path / "x.jsonl")
    before = find_sources(str(path))["train"].identity()
    assert find_sources(str(path))["train"].identity() == before
    write(path, RECORDS[:2])
    assert find_sources(str(path))["train"].identity() != before


def test_a_file_replaces_a_split_of_the_data_set(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/train", "data/validation", "v", "t"):
        write(tmp_path / f"{name}.jsonl", [{"id": name, "document": name, "summary": "s"}])
    data, v, t = (str(tmp_path / name) for name in ("data", "v.jsonl", "t.jsonl"))

    def ids(**files):
        return {split: [name for name, *_ in read(source)] for split, source in find_sources(data, **files).items()}

    assert ids(validation_file=v) == {"train": ["data/train"], "validation": ["v"]}
    assert ids(test_file=t) == {"train": ["data/train"], "validation": ["data/validation"], "test": ["t"]}
    assert ids(train_file=t, validation_file=v) == {"train": ["t"], "validation": ["v"]}


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    columns = [pa.array(["first"]), pa.array(["second"]), pa.array(["s"])]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_arrays(columns, names=["document", "document", "summary"]), path)
    with pytest.raises(ValueError, match=r"a.parquet: two columns are named 'document'; rename one"):
        list(read_records(path, lambda error: None))


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_a_row_of_a_table_with_bytes_that_are_not_utf8_is_named_and_may_be_skipped(tmp_path, monkeypatch, kind):
    ends = pa.py_buffer(struct.pack("<5i", 0, 2, 4, 6, 8))
    texts = pa.Array.from_buffers(pa.string(), 4, [None, ends, pa.py_buffer(b"okab\xff\xfeyz")])
    table = pa.table({"document": texts, "summary": ["a", "b", "c", "d"]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    if kind == "parquet":
        source = Source("file", str(path), "train", (path,))
    elif kind == "saved":
        Dataset(table).save_to_disk(tmp_path / "saved")
        source = Source("saved", str(tmp_path / "saved"), "train")
    else:
        monkeypatch.setattr("recurrent_bart.data.sources.load_dataset", lambda *args, **options: Dataset(table))
        source = Source("hub", "name", "train", hub_split="train")
    place = r"a\.parquet:3" if kind == "parquet" else r"(saved|name)\[2\]"
    with pytest.raises(ValueError, match=rf"{place}: unreadable row \(.*byte 0xff"):
        read(source)
    errors = []
    rows = replace(source, skips_bad=True).rows("document", Columns(), errors.append)
    assert [row.sections for row in rows] == [["ok"], ["ab"], ["yz"]]
    assert len(errors) == 1
