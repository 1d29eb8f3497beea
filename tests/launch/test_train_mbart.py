"""`launch/train.py` on checkpoints of MBart, with tokenizers of one and of several languages."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, MBart50Tokenizer, MBartTokenizer

from launching import load_script
from recurrent_bart.data.tokenizer import load_tokenizer, train_tokenizer
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.preparation import open_splits
from runs import WORDS, cut_off, flags
from saved_tensors import differing, saved_tensors
from tiny import multilingual_tokenizer, plain_model

TEXT = " ".join(WORDS)
LANGUAGES = {"source_lang": "en_XX", "target_lang": "de_DE"}
KINDS = {"MBart": MBartTokenizer, "MBart-50": MBart50Tokenizer, "one language": None}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def checkpoint(kind, tmp_path):
    """Write a tiny MBart with its tokenizer."""
    torch.manual_seed(0)
    several = KINDS[kind]
    tokenizer = train_tokenizer([TEXT], 320) if several is None else multilingual_tokenizer(several, [TEXT])
    fields = {} if kind == "MBart" else {"decoder_start_token_id": 2}
    model = plain_model("mbart", vocab_size=len(tokenizer), dropout=0.1, scale_embedding=True, **fields)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def arguments(checkpoint, kind, documents):
    """Return a function from a folder and flags to the command line of a run."""
    languages = {} if KINDS[kind] is None else LANGUAGES
    given = {"model_name_or_path": checkpoint, **languages}
    return lambda folder, **changes: flags(documents, folder, **given | changes)


def test_special_tokens_of_segments_and_targets_are_the_tokenizers(arguments, kind, tmp_path):
    parsed = parse_arguments(arguments(tmp_path / "run", task="sections"))
    tokenizer, config, splits = open_splits(parsed.model, parsed.data)
    english, german, bos, eos = tokenizer.convert_tokens_to_ids(["en_XX", "de_DE", "<s>", "</s>"])
    collator, corpus = splits["train"].collator, splits["train"].corpus
    segments, targets = collator.segments(corpus[0])
    texts = {"MBart": (0, 2), "MBart-50": (1, 1), "one language": (1, 1)}[kind]
    around = {(tuple(part[: texts[0]]), tuple(part[-texts[1] :])) for part in segments}
    around_targets = {(tuple(part[: texts[0]]), tuple(part[-texts[1] :])) for part in targets if part}
    expected = {
        "MBart": ((), (eos, english)),
        "MBart-50": ((english,), (eos,)),
        "one language": ((bos,), (eos,)),
    }[kind]
    assert around == {expected}
    assert around_targets == {tuple(tuple(german if id == english else id for id in part) for part in expected)}
    assert all(len(part) <= 16 for part in segments)
    assert all(len(part) <= 8 for part in targets)
    assert config.decoder_start_token_id == (german if kind == "MBart" else eos)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["document", "sections"])
def test_a_run_trains_resumes_evaluates_and_summarises(arguments, kind, task, train_main, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_main(arguments(whole, task=task, max_steps=4)) == 0
    cut_off(whole, cut)
    assert train_main(["--resume", str(cut)]) == 0
    found, expected = (saved_tensors(run / "checkpoints" / "step-00000004") for run in (cut, whole))
    assert not differing(found, expected)
    assert any("exp_avg" in name for name in expected)
    losses = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in losses if "loss" in record]
    model, tokenizer = (read(str(whole / "model")) for read in (AutoModelForSeq2SeqLM.from_pretrained, load_tokenizer))
    german, eos = tokenizer.convert_tokens_to_ids("de_DE"), tokenizer.eos_token_id
    assert model.config.normalize_before
    assert model.generation_config.decoder_start_token_id == (german if kind == "MBart" else eos)
    assert model.generation_config.forced_bos_token_id == (german if kind == "MBart-50" else None)
    (tmp_path / "text.txt").write_text(f"{TEXT} {TEXT}")
    capsys.readouterr()
    assert load_script("evaluate").main(["--model", str(whole / "model")]) == 0
    assert load_script("summarize").main(["--model", str(whole / "model"), str(tmp_path / "text.txt")]) == 0
    picture = ["--output", str(tmp_path / "map.png")]
    assert load_script("memory_map").main(["--model", str(whole / "model"), str(tmp_path / "text.txt"), *picture]) == 0


@pytest.mark.parametrize(
    ("kind", "languages", "message"),
    [
        ("MBart", {"source_lang": "xx"}, "--source_lang xx: not a language code of the tokenizer"),
        ("MBart-50", {"target_lang": "xx"}, "--target_lang xx: not a language code of the tokenizer"),
        ("one language", {"source_lang": "en_XX"}, "--source_lang en_XX: the tokenizer of"),
    ],
)
def test_a_wrong_language_code_ends_the_command_in_one_line(
    arguments, languages, message, train_main, tmp_path, capsys
):
    assert train_main(arguments(tmp_path / "run", **languages)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not (tmp_path / "run").exists()
