"""User errors: each is found before a file is written, and reported in one line."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from recurrent_bart.data.rows import split_of
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.preparation import (
    default_output_dir,
    find_training_sources,
    make_run_folder,
    open_documents,
    prepare,
)

ALONE = Environment(0, 0, 1, torch.device("cpu"))
RECORDS = [{"id": f"d{i}", "document": f"text number {i} " * 30, "summary": f"number {i}"} for i in range(30)]


def write(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def prepare_run(tmp_path):
    """Return a function that prepares a run on a file in `tmp_path` with changed flags."""
    if not (tmp_path / "train.jsonl").exists():
        write(tmp_path / "train.jsonl")

    def call(**flags):
        flags = {
            "dataset": tmp_path / "train.jsonl",
            "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / "run",
            "vocab_size": 300,
        } | flags
        argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return prepare(parse_arguments(argv), ALONE)

    return call


def test_a_run_has_all_that_it_starts_from(prepare_run, tmp_path):
    prepared = prepare_run(segment_size=32, max_n_segments=2, max_target_length=5)
    train, validation = prepared.splits["train"], prepared.splits["validation"]
    assert len(train.corpus) + len(validation.corpus) == 30
    assert prepared.config.vocab_size == len(prepared.tokenizer)
    assert prepared.deepspeed["zero_optimization"]["stage"] == 2
    batch = train.collator([{**train.corpus[0], "index": 0}])
    assert batch.input_ids.shape == (1, 2, 32)
    assert batch.input_ids[0, 0, 0] == 0
    assert batch.input_ids[0, 0, 31] == 2
    assert batch.labels.shape[1] <= 5
    # the run folder does not exist yet
    assert not (tmp_path / "run").exists()


def test_a_part_of_the_documents_is_the_same_for_every_seed_and_grows(prepare_run):
    def names(split, **flags):
        documents = prepare_run(**flags).splits[split]
        assert len(documents.plan.indices) == len(documents.corpus)
        return list(documents.corpus["id"])

    whole = names("train")
    five, ten = names("train", max_train_documents=5), names("train", max_train_samples=10, seed=1)
    assert (len(five), len(ten)) == (5, 10)
    assert set(five) < set(ten) < set(whole)
    # in the order of the file, but not its first documents
    assert [name for name in whole if name in ten] == ten != whole[:10]
    assert names("train", max_eval_documents=1) == names("train", max_train_documents=1000) == whole
    assert len(names("validation", max_eval_documents=1)) == 1
    assert names("validation", max_train_documents=1) == names("validation")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_documents_drawn_do_not_depend_on_the_segment_size(prepare_run, tmp_path, split):
    """A shorter segment has no room for some questions. Their documents are missing, and no document replaces them."""
    records = [record | {"query": "text number " * (1 + 9 * (i % 3 == 0))} for i, record in enumerate(RECORDS)]
    path = write(tmp_path / "asked.jsonl", records)
    flag = {"train": "max_train_documents", "validation": "max_eval_documents"}[split]
    flags = {"train_file": path, "validation_file": path, "query_column": "query", flag: 8}

    def drawn(**changes):
        prepared = prepare_run(**flags, **changes)
        return list(prepared.splits[split].corpus["id"]), prepared.documents()[split]["fingerprint"]

    (whole, first), (short, second) = (drawn(segment_size=size, skip_bad_samples=True) for size in (64, 24))
    asked_much = {record["id"] for record in records[::3]}
    assert 0 < len(asked_much & {*whole}) < len(whole) == 8
    assert short == [name for name in whole if name not in asked_much]
    again, of_file = drawn(segment_size=64)
    assert again == whole
    # without --skip_bad_samples, the hash is that of the file, as in earlier versions
    assert len({first, second, of_file}) == 3


def test_a_batch_without_room_for_a_segment_is_refused(prepare_run):
    with pytest.raises(ValueError, match="--tokens_per_batch 39: must be at least 40, the tokens of a segment"):
        prepare_run(segment_size=32, input_size=40, tokens_per_batch=39)
    assert prepare_run(segment_size=32, input_size=40, tokens_per_batch=40)


def test_tokenizer_and_documents_come_from_the_cache_the_second_time(prepare_run, capsys):
    first = prepare_run()
    said = capsys.readouterr().out
    assert "training a tokenizer of 300 ids on" in said
    assert said.count("tokenising") == 2
    second = prepare_run()
    assert capsys.readouterr().out == ""
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_training_documents_come_again_with_sentences_of_their_own_as_targets(prepare_run, tmp_path, capsys):
    sentences = [f"sentence {number} of this text says what the others say of it" for number in range(40)]
    texts = [". ".join([*sentences, f"the last one is {number}"]) + "." for number in range(len(RECORDS))]
    write(tmp_path / "train.jsonl", [record | {"document": text} for record, text in zip(RECORDS, texts, strict=True)])
    plain = prepare_run()
    capsys.readouterr()
    again = prepare_run(gap_sentences=2)
    # the tokenizer is trained without the copies, and the validation documents do not change
    said = capsys.readouterr().out
    assert said.count("tokenising") == 1
    assert "training a tokenizer" not in said
    assert again.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    train, validation = (again.splits[split].corpus for split in ("train", "validation"))
    assert len(train) == 3 * len(plain.splits["train"].corpus)
    assert validation["id"] == plain.splits["validation"].corpus["id"]
    assert train["id"][:3] == [train["id"][0], f"{train['id'][0]} (0)", f"{train['id'][0]} (1)"]
    assert train["summary_texts"][0] == plain.splits["train"].corpus["summary_texts"][0]
    assert train["summary_texts"][1][0].startswith("sentence")


def test_a_pretrained_models_own_tokenizer_is_used(prepare_run, bart, tmp_path):
    prepared = prepare_run()
    model = tmp_path / "bart"
    bart.config.max_position_embeddings = 40
    bart.resize_token_embeddings(len(prepared.tokenizer))
    bart.save_pretrained(model)
    prepared.tokenizer.save_pretrained(model)
    again = prepare_run(model_name_or_path=model, vocab_size=999)
    assert again.tokenizer.get_vocab() == prepared.tokenizer.get_vocab()
    assert again.config.d_model == bart.config.d_model


def test_a_pretrained_model_without_a_tokenizer_is_refused(prepare_run, bart, tmp_path):
    bart.save_pretrained(tmp_path / "bart")
    with pytest.raises(ValueError, match=r"bart: no tokenizer could be loaded"):
        prepare_run(model_name_or_path=tmp_path / "bart")


def test_another_cap_may_be_set_on_opening_documents(prepare_run, tmp_path):
    prepared = prepare_run(segment_size=16, max_n_segments=1)
    data = parse_arguments(["--dataset", str(tmp_path / "train.jsonl"), "--cache_dir", str(tmp_path / "cache")]).data
    source = next(iter(sources_of(tmp_path).values()))
    whole = open_documents(source, data, prepared.config, prepared.tokenizer, max_n_segments=-1)
    assert min(whole.plan.n_segments) > 1
    assert set(prepared.splits["train"].plan.n_segments) == {1}


def sources_of(tmp_path):
    return find_training_sources(parse_arguments(["--dataset", str(tmp_path / "train.jsonl")]).data)


def no_target_before_the_cut():
    return [{"id": f"d{i}", "sections": ["a " * 90, f"b{i}"], "summaries": ["", "B"]} for i in range(30)]


@pytest.mark.parametrize(
    ("records", "flags", "message"),
    [
        ([], {}, r"train.jsonl: the file is empty"),
        ([{"document": "t"}], {}, r"train.jsonl:1: no column 'summary'; the columns are 'document'"),
        ([*RECORDS, {"document": "t", "summary": " "}], {}, r"train.jsonl:31: the summary is empty"),
        ([*RECORDS, {"document": "\n", "summary": "s"}], {}, r"train.jsonl:31: the document is empty"),
        (RECORDS, {"task": "sections"}, r"train.jsonl:1: no column 'sections'"),
        (RECORDS, {"text_column": "body"}, r"train.jsonl:1: no column 'body'"),
        (no_target_before_the_cut(), {"task": "sections", "segment_size": 16, "max_n_segments": 2}, r"no document has"),
        (RECORDS, {"dataset": "none.jsonl"}, r"none.jsonl: no such file or folder"),
        (RECORDS, {"deepspeed": "none.json"}, r"--deepspeed none.json: No such file"),
        (RECORDS, {"segment_size": 2000}, r"segment_size=2000, .* must be at most max_position_embeddings"),
        (RECORDS, {"model_size": "huge"}, r"--model_size huge: allowed are"),
        (RECORDS, {"vocab_size": 100}, r"vocab_size=100: no tokenizer could be trained"),
        (RECORDS, {"model_name_or_path": "no/model"}, r"no/model: no tokenizer could be loaded"),
        (RECORDS, {"output_dir": "/proc/self/run"}, r"--output_dir /proc/self/run: cannot be"),
        (RECORDS, {"cache_dir": "/proc/self/cache"}, r"/proc/self/cache/tokenizers: cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(prepare_run, tmp_path, records, flags, message):
    write(tmp_path / "train.jsonl", records)
    with pytest.raises(ValueError, match=message) as caught:
        prepare_run(**flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    # the cache holds no incomplete files
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]
    assert left == []


def test_a_broken_line_is_named_by_file_and_line(prepare_run, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + '{"document": "t", \n')
    with pytest.raises(ValueError, match=r"train.jsonl:31: unreadable line"):
        prepare_run()
    assert not any((tmp_path / "cache").rglob("*.*"))


def test_a_file_in_the_way_of_the_run_is_refused(prepare_run, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"--output_dir .*run is not a folder"):
        prepare_run()
    assert not (tmp_path / "cache").exists()


def test_a_run_that_is_there_already_is_not_overwritten(prepare_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
        prepare_run()


def test_a_new_run_is_named_by_what_is_trained():
    arguments = parse_arguments(["--dataset", "some/where/qmsum", "--task", "sections", "--model_size", "small"])
    folder = Path(default_output_dir(arguments))
    assert folder.parent == Path("runs")
    assert folder.name.split("-", 2)[2] == "qmsum-sections-small"
    assert os.sep not in folder.name


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20261201-120000")
    made = [make_run_folder(parse_arguments([])) for _ in range(3)]
    name = "20261201-120000-stdlib-document-tiny"
    assert [str(folder.path) for folder, _ in made] == [f"runs/{name}", f"runs/{name}-2", f"runs/{name}-3"]
    assert [[path.name for path in paths] for _, paths in made] == [[name, "runs"], [f"{name}-2"], [f"{name}-3"]]


def test_a_file_named_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    with pytest.raises(ValueError, match="runs is not a folder"):
        make_run_folder(parse_arguments([]))


def resume(tmp_path, **flags):
    argv = [
        "--resume",
        str(tmp_path / "run"),
        *(part for name, value in flags.items() for part in (f"--{name}", value)),
    ]
    return prepare(parse_arguments(argv), ALONE)


@pytest.fixture
def begun(prepare_run, tmp_path):
    """Write the configuration and the tokenizer of a started run."""
    write(tmp_path / "train.jsonl", [{name: record[name] for name in ("document", "summary")} for record in RECORDS])
    prepared = prepare_run()
    arguments = parse_arguments(["--dataset", str(tmp_path / "train.jsonl"), "--cache_dir", str(tmp_path / "cache")])
    arguments.run.output_dir = str(tmp_path / "run")
    config = {"arguments": asdict(arguments), "documents": prepared.documents()}
    prepared.folder.create()
    prepared.folder.write_config(**config)
    prepared.tokenizer.save_pretrained(prepared.folder.tokenizer)
    return prepared, config


def test_a_resumed_run_has_the_documents_that_it_had(begun, tmp_path):
    expected = begun[0].documents()
    assert resume(tmp_path).documents() == expected
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    assert resume(tmp_path, dataset=str(moved)).documents() == expected


def test_documents_without_a_target_in_the_segments_read_are_counted_too(prepare_run, tmp_path):
    """A resumed run may therefore change `--max_n_segments`."""
    records = []
    for number in range(30):
        sections = [f"text number {number} in section {section} " * 5 for section in range(4)]
        summaries = ["", "", "", "late"] if number % 2 else ["early"] * 4
        records.append({"id": f"d{number}", "sections": sections, "summaries": summaries})
    write(tmp_path / "train.jsonl", records)
    flags = {"task": "sections", "segment_size": 32}
    short, whole = prepare_run(**flags, max_n_segments=1), prepare_run(**flags, max_n_segments=-1)
    assert len(short.splits["train"].plan.indices) < len(whole.splits["train"].plan.indices)
    assert short.documents() == whole.documents()
    assert sum(split["number"] for split in short.documents().values()) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--resume .*run: the (train|validation) documents differ .* \(\d+ then, \d+ now\).* start a new run"),
        ({"validation_share": "0.4"}, r"--validation_share 0.4: the run was started with 0.1, .* start a new run"),
    ],
)
def test_a_run_is_not_resumed_with_other_documents(begun, tmp_path, changes, message):
    path = tmp_path / "train.jsonl"
    if not changes:
        path.write_text(json.dumps({"document": "a line on top", "summary": "s"}) + "\n" + path.read_text())
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, **changes)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_run_of_an_older_version_keeps_its_split_and_says_that_documents_are_not_compared(begun, tmp_path, capsys):
    prepared, config = begun
    for name in ("held_out_by", "validation_share", "group_column", "encoding"):
        del config["arguments"]["data"][name]
    prepared.folder.write_config(arguments=config["arguments"])
    capsys.readouterr()
    held_out = resume(tmp_path).splits["validation"].corpus["id"]
    assert "does not record the documents of the run" in capsys.readouterr().out
    lines = [f"train.jsonl:{number + 1}" for number in range(len(RECORDS))]
    assert held_out[:] == [line for line in lines if split_of(line) == "validation"]


def test_what_a_data_set_holds_beside_its_splits_is_said(prepare_run, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", RECORDS)
    write(folder / "dev.jsonl", RECORDS[:3])
    write(folder / "more.jsonl", RECORDS)
    prepared = prepare_run(dataset=folder)
    assert len(prepared.splits["validation"].corpus) == 3
    assert f"warning: {folder}: not read: more.jsonl" in capsys.readouterr().out


def test_the_configuration_of_a_data_set_reaches_the_library_or_is_said_to_change_nothing(capsys, monkeypatch):
    asked = []

    def names_of_splits(*place):
        asked.append(place)
        return ["train", "validation"]

    monkeypatch.setattr("recurrent_bart.data.sources.get_dataset_split_names", names_of_splits)
    flags = ["--dataset_config_name", "long"]
    found = find_training_sources(parse_arguments(["--dataset", "owner/name", *flags]).data)
    assert asked == [("owner/name", "long")]
    assert {source.config_name for source in found.values()} == {"long"}
    assert "warning" not in capsys.readouterr().out
    find_training_sources(parse_arguments(flags).data)
    assert "warning: --dataset_config_name has no effect" in capsys.readouterr().out


def test_a_run_keeps_the_configuration_of_its_data_set(begun, tmp_path):
    with pytest.raises(ValueError, match="--dataset_config_name long: the run was started without this flag"):
        resume(tmp_path, dataset_config_name="long")


def test_a_file_in_another_encoding_is_read(prepare_run, tmp_path):
    text = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_bytes(text.encode("utf-16"))
    assert len(prepare_run(encoding="utf-16").splits["train"].corpus)
    with pytest.raises(ValueError, match="--encoding klingon: unknown encoding; examples are"):
        prepare_run(encoding="klingon")
