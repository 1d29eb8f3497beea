"""A trained tokenizer loads with Hugging Face and encodes as sentencepiece does."""

import copy
import json
import unicodedata

import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertTokenizer, MBart50Tokenizer, MBartTokenizer

from recurrent_bart.data import tokenizer as module
from recurrent_bart.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    special_tokens_around,
    special_tokens_around_targets,
    train_tokenizer,
)
from tiny import multilingual_tokenizer

TEXTS = [f"the {word} of number {i} is returned as a list_{i % 7}({word})" for i, word in enumerate(dir(str) * 5)]
HARD = [
    "the  list\n\n of numbers",
    "naïve café 東京 は 🙂",
    " leading and trailing ",
    "ﬁgure Ⅳ ｆｕｌｌ",
    "__init__(self, x=0x1F)",
    "a",
    "unseenword_ÿ",
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocab_size=500)


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(trained, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_special_ids_equal_those_of_bart(loaded):
    ids = [loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id]
    assert ids == [0, 1, 2, 3]
    assert loaded.mask_token == "<mask>"
    assert special_tokens_around(loaded) == ([0], [2])
    ids = loaded("the list")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)


@pytest.mark.parametrize(
    ("template", "around"),
    [
        ("<s> $A </s>", ([0], [2])),
        ("$A </s>", ([], [2])),
        ("<s> $A", ([0], [])),
        ("$A", ([], [])),
        ("<s> $A </s> </s>", ([0], [2, 2])),
    ],
)
def test_special_tokens_around_a_text_are_those_that_the_tokenizer_adds(trained, template, around):
    tokenizer = copy.deepcopy(trained)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    assert special_tokens_around(tokenizer) == around


@pytest.mark.parametrize("text", HARD + TEXTS[:5])
def test_a_loaded_tokenizer_gives_the_same_ids_and_keeps_the_text(trained, loaded, text):
    ids = loaded(text)["input_ids"]
    assert ids == trained(text)["input_ids"]
    assert loaded.unk_token_id not in ids
    expected = " ".join(unicodedata.normalize("NFKC", text).split())
    assert loaded.decode(ids, skip_special_tokens=True) == expected


def test_spaces_before_punctuation_are_kept(trained, loaded):
    text = "a list . it is n't , is it ? do not ! we 've"
    for tokenizer in (trained, loaded):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_gives_the_pieces_of_sentencepiece(monkeypatch):
    models = []
    convert = module.as_hugging_face
    monkeypatch.setattr(module, "as_hugging_face", lambda model: models.append(model) or convert(model))
    ours = train_tokenizer(TEXTS, vocab_size=500)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=models[0])
    for text in HARD + TEXTS[:50]:
        normal = " ".join(unicodedata.normalize("NFKC", text).split())
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(normal)


def test_training_is_repeatable(trained):
    assert train_tokenizer(TEXTS, vocab_size=500).get_vocab() == trained.get_vocab()


def test_a_large_corpus_is_sampled_from_all_of_it_and_repeatably(monkeypatch):
    monkeypatch.setattr(module, "MAX_LINES", 200)
    texts = [f"{word} {i}" for word in ("first", "середина", "最後") for i in range(1000)]
    vocabulary = train_tokenizer(texts, vocab_size=400).get_vocab()
    assert all(character in "".join(vocabulary) for character in "firstсередина最後")
    assert train_tokenizer(texts, vocab_size=400).get_vocab() == vocabulary
    monkeypatch.setattr(module, "MAX_LINES", 210)
    assert train_tokenizer(texts, vocab_size=400).get_vocab() != vocabulary


def test_a_small_corpus_gives_a_small_vocabulary():
    assert 261 < len(train_tokenizer(["a few words only"], vocab_size=4000)) < 400


def test_a_too_small_vocabulary_and_no_text_are_refused():
    with pytest.raises(ValueError, match="vocab_size=100: no tokenizer could be trained"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(ValueError, match="no tokenizer could be trained"):
        train_tokenizer([], vocab_size=500)


def test_an_error_while_texts_are_read_is_raised_unchanged():
    def texts():
        yield from TEXTS
        raise ValueError("file:3: unreadable")

    with pytest.raises(ValueError, match=r"^file:3: unreadable$"):
        train_tokenizer(texts(), vocab_size=500)


def test_a_model_without_a_tokenizer_is_refused(bart, tmp_path):
    bart.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_barts_special_tokens_is_refused(trained, tmp_path):
    trained.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="the tokenizer has no bos_token, eos_token, pad_token"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.fixture
def bert(tmp_path):
    """Write a tokenizer like that of fnlp/bart-base-chinese, with [CLS] and [SEP] but without bos and eos."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"会议纪要"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_cls_and_sep_stand_for_missing_bos_and_eos(bert, tmp_path):
    tokenizer = load_tokenizer(str(bert))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 0)
    assert special_tokens_around(tokenizer) == ([2], [3])
    save_tokenizer(tokenizer, tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert (saved.bos_token_id, saved.eos_token_id) == (2, 3)
    assert special_tokens_around(saved) == ([2], [3])


@pytest.fixture
def with_code(bert):
    """Write a tokenizer with Python code that creates a file when it runs."""
    (bert / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertTokenizer\n"
        f"Path({str(bert / 'ran')!r}).touch()\n"
        "class OwnTokenizer(BertTokenizer):\n"
        "    pass\n"
    )
    config = json.loads((bert / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (bert / "tokenizer_config.json").write_text(json.dumps(config))
    return bert


def test_code_of_a_tokenizer_runs_only_with_trust_remote_code(with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(
        ValueError,
        match="the tokenizer needs Python code from this folder; if you trust the code, add --trust_remote_code",
    ):
        load_tokenizer(str(with_code))
    assert not (with_code / "ran").exists()
    tokenizer = load_tokenizer(str(with_code), trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    assert tokenizer.bos_token_id == 2


@pytest.fixture(params=[MBartTokenizer, MBart50Tokenizer], ids=["MBart", "MBart-50"])
def multilingual(request, tmp_path):
    """Write a tokenizer of several languages that names none, as on the Hugging Face Hub."""
    multilingual_tokenizer(request.param).save_pretrained(tmp_path / "several")
    file = tmp_path / "several" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"src_lang": None, "tgt_lang": None}))
    return tmp_path / "several"


def around(multilingual, tokenizer, code):
    """Return the special ids that the paper of the tokenizer puts around a text in a language."""
    own, eos = tokenizer.convert_tokens_to_ids(code), tokenizer.eos_token_id
    is_50 = json.loads((multilingual / "tokenizer_config.json").read_text())["tokenizer_class"] == "MBart50Tokenizer"
    return ([own], [eos]) if is_50 else ([], [eos, own])


@pytest.mark.parametrize("target_lang", [None, "ro_RO"])
def test_language_codes_stand_where_the_tokenizer_puts_them_and_are_saved(multilingual, target_lang, tmp_path):
    loaded = load_tokenizer(str(multilingual), source_lang="de_DE", target_lang=target_lang)
    save_tokenizer(loaded, tmp_path / "saved")
    for tokenizer in (loaded, load_tokenizer(str(tmp_path / "saved"))):
        assert special_tokens_around(tokenizer) == around(multilingual, tokenizer, "de_DE")
        assert special_tokens_around_targets(tokenizer) == around(multilingual, tokenizer, target_lang or "de_DE")
        # the tokenizer still encodes documents
        assert special_tokens_around(tokenizer) == around(multilingual, tokenizer, "de_DE")


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        ({}, "needs the language of the documents; set --source_lang .* its codes are .*de_DE"),
        ({"source_lang": "xx_XX"}, "--source_lang xx_XX: not a language code .* its codes are .*de_DE"),
        ({"source_lang": "de_DE", "target_lang": "xx"}, "--target_lang xx: not a language code"),
    ],
)
def test_a_language_code_that_is_missing_or_unknown_is_refused(multilingual, languages, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(multilingual), **languages)


def test_language_codes_for_a_tokenizer_of_one_language_are_refused(bert):
    with pytest.raises(ValueError, match=r"--target_lang ja_XX: the tokenizer of .* adds no language codes"):
        load_tokenizer(str(bert), target_lang="ja_XX")
    tokenizer = load_tokenizer(str(bert))
    assert special_tokens_around_targets(tokenizer) == special_tokens_around(tokenizer)
