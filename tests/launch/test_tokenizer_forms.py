"""Tokenizers in every form that checkpoints have: each trains, resumes, and its model works on another machine."""

import io
import json
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import MBart50Tokenizer, MBartTokenizer

from launching import load_script
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import load_tokenizer, special_tokens_around, train_tokenizer
from recurrent_bart.data.tokenizer_identity import tokenizer_identity
from runs import WORDS, flags
from tiny import multilingual_tokenizer, plain_model

TEXT, JAPANESE = " ".join(WORDS), "会議を始めます。予算について議論しました。"
# full-width letters, a ligature, a special token's name
TEXTS = [TEXT, JAPANESE, "ｂｅｅ　ﬁg", "a </s> b"]
BERTS_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "forced_eos_token_id": 3}
FLAGS = {"source_lang": "ja_XX", "target_lang": "en_XX"}
LANGUAGES = {"src_lang": "ja_XX", "tgt_lang": "en_XX"}
TARGET_BEGINS = {"decoder_start_token_id": 2}


def write_sentencepiece(folder):
    """Write a sentencepiece model, whose own rules of normalisation are part of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, JAPANESE, "fig"] * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=120,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())


def write_json(folder):
    train_tokenizer([TEXT, JAPANESE] * 5, 320).backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_class(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_ku_nlps(folder):
    """Write the files of ku-nlp's models: a sentencepiece model and the name of the class."""
    write_sentencepiece(folder)
    write_class(folder, tokenizer_class="XLMRobertaTokenizer")


def write_mbart_50(folder):
    write_sentencepiece(folder)
    write_class(folder, tokenizer_class="MBart50Tokenizer", **LANGUAGES)


def write_mbarts_json(folder):
    tokenizer = multilingual_tokenizer(MBartTokenizer, [TEXT, JAPANESE], **LANGUAGES)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_saved_mbart_50(folder):
    multilingual_tokenizer(MBart50Tokenizer, [TEXT, JAPANESE], **LANGUAGES).save_pretrained(folder)


def write_japanese_bert(folder):
    """Write a vocabulary of words that MeCab finds, and of their characters."""
    pytest.importorskip("fugashi")
    characters = sorted({*TEXT, *JAPANESE} - {" "})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "会議", "予算", *characters]
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, *map("##{}".format, characters)]))
    mecab = {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    write_class(folder, tokenizer_class="BertJapaneseTokenizer", subword_tokenizer_type="wordpiece", **mecab)


# family of the model, its fields, writer of the tokenizer's files, flags of the run
FORMS = {
    "sentencepiece, MBart": ("mbart", {}, write_sentencepiece, FLAGS),
    "sentencepiece, ku-nlp": ("mbart", TARGET_BEGINS, write_ku_nlps, {}),
    "sentencepiece, MBart-50": ("mbart", TARGET_BEGINS, write_mbart_50, {}),
    "tokenizer.json, BART": ("bart", {}, write_json, {}),
    "tokenizer.json, MBart of one language": ("mbart", TARGET_BEGINS, write_json, {}),
    "tokenizer.json, MBart": ("mbart", {}, write_mbarts_json, FLAGS),
    "saved, MBart-50": ("mbart", TARGET_BEGINS, write_saved_mbart_50, {}),
    "BertJapanese": ("bart", BERTS_IDS | {"decoder_start_token_id": 3}, write_japanese_bert, {}),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def checkpoint(form, tmp_path):
    family, fields, write, _ = form
    torch.manual_seed(0)
    plain_model(family, vocab_size=400, **fields).save_pretrained(tmp_path / "checkpoint")
    write(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def written(tmp_path):
    """Write documents in English and Japanese."""
    for split in ("train", "validation"):
        rows = [{"document": f"{TEXT} {JAPANESE} " * 2, "summary": f"{word}。"} for word in WORDS[:4]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def ids_of(tokenizer):
    return [special_tokens_around(tokenizer), *TextEncoder(tokenizer)(TEXTS)]


@pytest.mark.slow
def test_each_form_trains_resumes_and_works_elsewhere(form, checkpoint, written, train_main, tmp_path, capsys):
    languages = form[3]
    tokenizer = load_tokenizer(str(checkpoint), **languages)
    expected = ids_of(tokenizer)
    assert tokenizer.unk_token_id not in expected[1]
    assert expected[2]
    run = tmp_path / "run"
    given = {"model_name_or_path": checkpoint, "max_steps": 2, "eval_every": 1, "warmup_steps": 0, **languages}
    assert train_main(flags(written, run, **given)) == 0
    whole = load_file(run / "model" / "model.safetensors")
    (run / "checkpoints" / "step-00000002").rename(tmp_path / "taken away")
    assert train_main(["--resume", str(run)]) == 0
    resumed = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())

    moved = tmp_path / "elsewhere"
    (run / "model").rename(moved)
    shutil.rmtree(checkpoint)
    run.rename(tmp_path / "gone")
    again = load_tokenizer(str(moved))
    assert ids_of(again) == expected
    assert tokenizer_identity(again) == tokenizer_identity(tokenizer)
    (tmp_path / "text.txt").write_text(f"{JAPANESE} {TEXT}")
    assert load_script("summarize").main(["--model", str(moved), str(tmp_path / "text.txt")]) == 0
    sets = ["--train_file", str(written / "train.jsonl"), "--validation_file", str(written / "validation.jsonl")]
    arguments = ["--model", str(moved), *sets, "--cache_dir", str(tmp_path / "cache"), "--max_target_length", "8"]
    assert load_script("evaluate").main(arguments) == 0


def test_a_sentencepiece_model_normalises_by_its_own_rules_in_each_class(tmp_path):
    ids = []
    for name in ("MBartTokenizer", "MBart50Tokenizer"):
        folder = tmp_path / name
        folder.mkdir()
        write_sentencepiece(folder)
        write_class(folder, tokenizer_class=name)
        tokenizer = load_tokenizer(str(folder), source_lang="ja_XX")
        full_width, usual = TextEncoder(tokenizer)(["ｂｅｅ　ﬁg", "bee fig"])
        assert full_width == usual
        assert tokenizer.unk_token_id not in usual
        tokenizer.save_pretrained(folder / "saved")
        saved = load_tokenizer(str(folder / "saved"))
        assert TextEncoder(saved)(TEXTS) == TextEncoder(tokenizer)(TEXTS)
        ids.append(usual)
    assert ids[0] == ids[1]


@pytest.mark.parametrize("family", ["bart", "mbart", None])
def test_a_tokenizer_json_decides_where_no_file_names_a_class(family, tmp_path):
    if family:
        plain_model(family, vocab_size=400).save_pretrained(tmp_path)
    write_json(tmp_path)
    tokenizer, trained = load_tokenizer(str(tmp_path)), train_tokenizer([TEXT, JAPANESE] * 5, 320)
    assert ids_of(tokenizer) == ids_of(trained)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.mask_token_id == trained.mask_token_id
    assert len(tokenizer) == len(trained)


def test_a_tokenizer_json_without_special_tokens_around_texts_gets_them(tmp_path):
    trained = train_tokenizer([TEXT] * 5, 320)
    content = json.loads(trained.backend_tokenizer.to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert special_tokens_around(load_tokenizer(str(tmp_path))) == ([0], [2])
