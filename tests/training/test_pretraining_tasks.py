"""Runs of `--task denoise` and `--task recall` on texts without summaries."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from launching import load_script
from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.tokenizer import save_tokenizer, train_tokenizer
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.document_order import by_documents
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.model_building import build_config
from recurrent_bart.training.preparation import open_splits
from recurrent_bart.training.training_batches import TrainingBatches
from runs import WORDS, flags
from tiny import tiny_model

TASKS = ("denoise", "recall")


@pytest.fixture
def texts(tmp_path):
    """Return a folder of text files without summaries, for training and validation."""
    for split, n_texts in (("train", 12), ("validation", 3)):
        folder = tmp_path / "texts" / split
        folder.mkdir(parents=True)
        for number in range(n_texts):
            words = [WORDS[(number + 5 * place) % len(WORDS)] for place in range(30 + 4 * number)]
            (folder / f"{number}.txt").write_text(" ".join(words))
    return tmp_path / "texts"


def argv_of(texts, folder, task, **changes):
    """Return the flags of a run with 12 segments at most, of up to 21 tokens."""
    # the targets of denoised segments are as long as the segments
    length = 128 if task == "denoise" else 24
    given = {"task": task, "segment_size": 24, "max_target_length": length, "max_n_segments": 12, **changes}
    argv = flags(texts, folder, **given)
    names = {"train.jsonl": "train", "validation.jsonl": "validation"}
    return [str(texts / names[part.rsplit("/", 1)[-1]]) if part.endswith(".jsonl") else part for part in argv]


def losses(folder):
    """Return the losses in the log by step and name."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "validation_loss", "gradient_norm")
    return [(record["step"], name, record[name]) for record in records for name in names if name in record]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_equals_one_that_was_not_interrupted(texts, tmp_path, train_main, capsys, task):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_main(argv_of(texts, whole, task, max_steps=4)) == 0
    printed = capsys.readouterr().out
    assert f"task {task}" in printed
    assert "generation" not in printed
    assert "samples" not in printed
    assert train_main(argv_of(texts, resumed, task, max_steps=2, lr_scheduler_type="constant")) == 0
    assert train_main(argv_of(texts, tmp_path / "same", task, max_steps=4, lr_scheduler_type="constant")) == 0
    assert train_main(["--resume", str(resumed), "--max_steps", "4"]) == 0
    assert losses(resumed) == losses(tmp_path / "same")
    models = [
        AutoModelForSeq2SeqLM.from_pretrained(path / "model").state_dict() for path in (resumed, tmp_path / "same")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    # a text is generated for no document
    assert not (whole / "samples.md").exists()
    context = json.loads((whole / "model" / "config.json").read_text())["decoder_context"]
    assert context == {"denoise": "all", "recall": "last"}[task]


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_draw_what_one_draws(texts, tmp_path, task):
    arguments = parse_arguments(argv_of(texts, tmp_path / "run", task, per_device_train_batch_size=4))
    _, _, splits = open_splits(arguments.model, arguments.data)
    documents = splits["train"]
    found = {}
    for n_processes in (1, 2):
        run = arguments.run
        run.per_device_train_batch_size = 4 // n_processes
        rows = []
        for rank in range(n_processes):
            state = TrainerState()
            order = by_documents(run, documents.plan.n_segments, world_size=n_processes, state=state)
            environment = Environment(rank, rank, n_processes, torch.device("cpu"))
            batches = TrainingBatches(documents, order, run, environment, state)
            for step in range(5):
                batch = next(batches)
                parts = zip(batch.indices, batch.input_ids, batch.attention_mask, batch.labels, strict=True)
                for index, ids, mask, labels in parts:
                    rows.append((step, index, ids[mask.bool()].tolist(), labels[labels >= 0].tolist()))
        found[n_processes] = sorted(rows)
    assert found[1] == found[2]
    # a text that is read twice is not drawn the same
    drawn = {}
    for _, index, ids, _ in found[1]:
        drawn.setdefault(index, []).append(ids)
    assert any(len(own) > 1 for own in drawn.values())
    assert all(own[0] != own[1] for own in drawn.values() if len(own) > 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gap_sentences": 1}, "--gap_sentences: has no use with --task denoise"),
        ({"max_target_length": 24}, "--max_target_length: has no use with --task denoise"),
        ({"query_column": "query"}, "--query_column: has no use with --task denoise"),
        ({"metric_for_best_model": "rouge1"}, "--metric_for_best_model rouge1: --task denoise generates no texts"),
    ],
    ids=["gap sentences", "length", "query", "metric"],
)
def test_flags_of_summaries_are_refused(texts, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argv_of(texts, tmp_path / "run", "denoise", **changes))


def test_an_evaluation_without_reference_texts_is_refused(tmp_path, capsys):
    assert load_script("evaluate").main(["--model", str(tmp_path), "--task", "recall"]) == 2
    assert "--task recall: these documents have no reference texts" in capsys.readouterr().err


def test_a_folder_without_texts_is_named(tmp_path, texts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no text")
    argv = argv_of(texts, tmp_path / "run", "denoise", train_file=tmp_path / "empty")
    arguments = parse_arguments(argv)
    with pytest.raises(ValueError, match=r"no texts NAME\.txt; the folder has notes\.md"):
        open_splits(arguments.model, arguments.data)


def test_the_target_of_a_denoised_segment_is_never_cut_after_the_usual_length(texts, tmp_path):
    (texts / "train" / "long.txt").write_text(" ".join(WORDS * 40))
    argv = argv_of(texts, tmp_path / "run", "denoise", segment_size=200)
    arguments = parse_arguments(argv)
    _, _, splits = open_splits(arguments.model, arguments.data)
    assert splits["train"].plan.n_cut_targets == 0
    longest = max(
        len(target)
        for row in range(13)
        for target in splits["train"].collator.segments({**splits["train"].corpus[row], "index": row})[1]
    )
    assert longest == 200


@pytest.mark.parametrize("context", ["all", "section"])
def test_what_is_recalled_is_never_seen(texts, tmp_path, context):
    """A trained model's context of all segments gives way, and the flag is refused."""
    tokenizer = train_tokenizer(WORDS * 30, 320)
    tiny_model(decoder_context=context, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "trained")
    save_tokenizer(tokenizer, tmp_path / "trained")
    argv = argv_of(texts, tmp_path / "run", "recall", model_name_or_path=tmp_path / "trained")
    arguments = parse_arguments(argv)
    assert build_config(arguments.model, tokenizer, "recall").decoder_context == "last"
    arguments.model.decoder_context = context
    with pytest.raises(ValueError, match=f"--decoder_context {context}: with --task recall"):
        build_config(arguments.model, tokenizer, "recall")


def test_a_model_without_a_state_cannot_recall(texts, tmp_path):
    arguments = parse_arguments(argv_of(texts, tmp_path / "run", "recall", recurrence="none"))
    with pytest.raises(ValueError, match="--task recall: the model has no state"):
        open_splits(arguments.model, arguments.data)


def test_texts_of_one_segment_cannot_be_recalled(texts, tmp_path):
    arguments = parse_arguments(argv_of(texts, tmp_path / "run", "recall", segment_size=500))
    with pytest.raises(ValueError, match="--segment_size: a text needs two segments"):
        open_splits(arguments.model, arguments.data)
