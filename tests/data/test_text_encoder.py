"""No text becomes a special token, with any tokenizer."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, BertJapaneseTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from recurrent_bart.data.corpus import load_corpus
from recurrent_bart.data.gap_sentences import GAP
from recurrent_bart.data.rows import Columns
from recurrent_bart.data.sources import find_sources
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import load_tokenizer, train_tokenizer
from recurrent_bart.data.tokenizer_identity import NO_SETTINGS, tokenizer_identity

PLAIN = ["every sentence closes with a mark", "  padding is added at the end\n", "naïve 東京 🙂", ""]
NAMES = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def unigram():
    return train_tokenizer([f"{text} <s> </s><pad>" for text in PLAIN] * 20, vocab_size=360)


def byte_pairs(**options):
    """Build a byte-level BPE tokenizer whose vocabulary contains the special tokens, also as results of merges."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(NAMES.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PLAIN, "<s></s><pad>"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def words():
    """Build a word-level tokenizer whose vocabulary contains the special tokens."""
    vocabulary = {word: n for n, word in enumerate([*NAMES.values(), *sorted({w for t in PLAIN for w in t.split()})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def slow(tmp_path):
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz/<>[]", "marker"]
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    return BertJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"
    )


@pytest.fixture(scope="module", params=["unigram", "bpe", "bpe ignoring merges", "words", "slow", "slow, by character"])
def tokenizer(request, tmp_path_factory):
    """Return a tokenizer that no test changes."""
    makers = {
        "unigram": unigram,
        "bpe": byte_pairs,
        "bpe ignoring merges": lambda: byte_pairs(ignore_merges=True),
        "words": words,
        "slow": lambda: slow(tmp_path_factory.mktemp("slow")),
        "slow, by character": CanineTokenizer,
    }
    return makers[request.param]()


def special_ids(tokenizer):
    return {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}


def test_special_tokens_in_a_text_are_ordinary_ids(tokenizer):
    marks = [token for token in tokenizer.all_special_tokens if token]
    texts = [*marks, "".join(marks), " ".join(f"a {mark} b" for mark in marks), f"x{''.join(marks)}y"]
    encoded = TextEncoder(tokenizer)(texts)
    assert all(not special_ids(tokenizer) & {*ids} for ids in encoded)
    # A one-character special token is dropped from the text.
    assert all(ids for mark, ids in zip(marks, encoded, strict=False) if len(mark) > 1)
    assert encoded[-1]


def test_texts_without_special_tokens_have_the_ids_of_the_tokenizer(tokenizer):
    expected = tokenizer(PLAIN, add_special_tokens=False)["input_ids"]
    assert TextEncoder(tokenizer)(PLAIN) == expected


@pytest.mark.parametrize("make", [unigram, byte_pairs])
def test_decoding_gives_the_text_back(make):
    tokenizer = make()
    text = "every <s>sentence</s> closes with </s> and <pad> or <mask><unk>"
    (ids,) = TextEncoder(tokenizer)([text])
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_wide_characters_do_not_become_a_special_token(tmp_path):
    tokenizer = unigram()
    assert tokenizer.eos_token_id in tokenizer("a ＜／ｓ＞ b", add_special_tokens=False)["input_ids"]
    (ids,) = TextEncoder(tokenizer)(["a ＜／ｓ＞ b"])
    assert not special_ids(tokenizer) & {*ids}
    assert tokenizer.decode(ids) == "a </s> b"


def test_words_added_to_a_tokenizer_stay_tokens(tmp_path):
    for tokenizer in (unigram(), byte_pairs()):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<speaker>"]})
        tokenizer.add_tokens(["Bürgerantrag"])
        added = tokenizer.convert_tokens_to_ids(["Bürgerantrag", "<speaker>"])
        (ids,) = TextEncoder(tokenizer)(["<speaker> Bürgerantrag </s>"])
        assert ids.count(added[0]) == 1
        assert added[1] not in ids
    tokenizer = slow(tmp_path)
    tokenizer.add_tokens(["zwei"])
    (ids,) = TextEncoder(tokenizer)(["a zwei [SEP]"])
    assert tokenizer.convert_tokens_to_ids("zwei") in ids


def test_a_gap_is_the_mask_token_and_the_text_mask_is_not(tokenizer):
    mask = tokenizer.mask_token_id
    encoder = TextEncoder(tokenizer)
    first, second = encoder(["every one"])[0], encoder([" a mark"])[0]
    assert encoder([f"every one {GAP} a mark"])[0] == [*first, mask, *second]
    assert mask not in encoder([f"every one {tokenizer.mask_token} a mark"])[0]


def test_sources_and_targets_of_a_corpus_hold_no_special_id(tmp_path):
    tokenizer = unigram()
    record = {"document": "<s>every</s> sentence <pad> <mask>", "summary": "closes </s> with <pad>"}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record) + "\n")
    source = find_sources("stdlib", train_file=str(path), validation_file=str(path))["train"]
    row = load_corpus(source, "document", Columns(), tokenizer, tmp_path)[0][0]
    assert not {*tokenizer.all_special_ids} & {*row["sections"][0], *row["summaries"][0]}
    assert tokenizer.decode(row["summaries"][0], skip_special_tokens=True) == record["summary"]


def test_the_settings_of_a_slow_tokenizer_are_part_of_its_identity(tmp_path):
    first, same, other, added = slow(tmp_path), slow(tmp_path), slow(tmp_path), slow(tmp_path)
    other.init_kwargs["do_lower_case"] = True
    added.add_tokens([AddedToken("zwei", lstrip=True)])
    identities = [tokenizer_identity(tokenizer) for tokenizer in (first, same, other, added)]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3
    moved = tmp_path / "moved"
    moved.mkdir()
    assert tokenizer_identity(slow(moved)) == identities[0]
    first.save_pretrained(moved / "saved")
    assert tokenizer_identity(load_tokenizer(str(moved / "saved"))) == identities[0]


def test_each_part_of_a_slow_tokenizer_is_part_of_its_identity(tmp_path):
    found = [tokenizer_identity(slow(tmp_path))]

    def changed(**settings):
        tokenizer = slow(tmp_path)
        tokenizer.init_kwargs |= settings
        return tokenizer_identity(tokenizer)

    found += [changed(do_lower_case=True), changed(never_split=["a"]), changed(word_tokenizer_type="mecab")]
    # a class of another name may encode in another way
    other = slow(tmp_path)
    other.__class__ = type("OtherTokenizer", (type(other),), {})
    found.append(tokenizer_identity(other))
    special = slow(tmp_path)
    special.add_special_tokens({"additional_special_tokens": ["<speaker>"]})
    found.append(tokenizer_identity(special))
    (tmp_path / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text() + "\nword")
    found.append(tokenizer_identity(BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic")))
    assert len(set(found)) == len(found)


def test_ids_are_part_of_a_slow_tokenizers_identity_where_no_file_holds_them(tmp_path):
    """Exchange the ids of two words, as in a tokenizer whose vocabulary comes from code."""
    tokenizer = slow(tmp_path)
    found, vocabulary = [tokenizer_identity(tokenizer)], dict(tokenizer.get_vocab())
    *_, one, other = vocabulary
    for exchanged in ({one: vocabulary[other], other: vocabulary[one]}, {one: len(vocabulary) + 1}):
        tokenizer.get_vocab = lambda exchanged=exchanged: vocabulary | exchanged
        found.append(tokenizer_identity(tokenizer))
    assert len(set(found)) == 3


def test_what_does_not_change_the_ids_is_no_part_of_a_slow_tokenizers_identity(tmp_path):
    tokenizer = slow(tmp_path)
    before = tokenizer_identity(tokenizer)
    assert NO_SETTINGS
    tokenizer.init_kwargs |= dict.fromkeys(NO_SETTINGS, "other") | {"some_file": "elsewhere", "some_path": "elsewhere"}
    assert tokenizer_identity(tokenizer) == before


@pytest.mark.parametrize("make", [unigram, byte_pairs, words])
def test_each_part_of_a_fast_tokenizer_is_part_of_its_identity(make, tmp_path):
    found = [tokenizer_identity(make())]
    assert tokenizer_identity(make()) == found[0]
    added, special, unmasked, normalised = make(), make(), make(), make()
    added.add_tokens(["Bürgerantrag"])
    special.add_special_tokens({"additional_special_tokens": ["<speaker>"]})
    # a gap in a text becomes the mask token, or `<mask>` in letters
    unmasked.mask_token = None
    normalised.backend_tokenizer.normalizer = normalizers.Lowercase()
    found += [tokenizer_identity(tokenizer) for tokenizer in (added, special, unmasked, normalised)]
    assert len(set(found)) == len(found)
    make().save_pretrained(tmp_path)
    assert tokenizer_identity(load_tokenizer(str(tmp_path))) == found[0]


PARTS = [
    "  \n every",
    " sentence",
    ". padding",
    " 東京",
    "。次",
    "\u3000naïve",
    " 🙂",
    "\r\nｆｕｌｌ ﬁsh",
    " 3",
    ".",
    "5",
    "</s>",
]


def test_tokens_have_the_characters_of_their_text(tokenizer):
    encoder, text = TextEncoder(tokenizer), "".join(PARTS)
    tokens = encoder.tokens(text)
    assert [token.id for token in tokens] == encoder([text])[0]
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        assert {token.start for token in tokens} == {-1}
        with pytest.raises(ValueError, match=f"{type(tokenizer).__name__} does not tell the characters"):
            encoder.require_characters()
        return
    read = {place for token in tokens for place in range(token.start, token.end)}
    assert [text[place] for place in sorted(read)] == [character for character in text if not character.isspace()]
    assert [token.start for token in tokens] == sorted(token.start for token in tokens)
    # some tokenizers read "。次" as one token
    ends = [text[: token.end][-1] for token in tokens if token.ends_passage]
    assert ends in ([".", "。", "🙂"], [".", "次", "🙂"])


def test_tokens_of_segmented_words_have_the_characters_of_the_text_without_spaces(monkeypatch):
    encoder = TextEncoder(unigram())
    encoder.segmenter = lambda texts: [text.replace("京都", "京 都").replace("です。", " です 。") for text in texts]
    text = f"東京都です。a b{GAP}京都"
    tokens = encoder.tokens(text)
    assert [token.id for token in tokens] == encoder([text])[0]
    read = [text[token.start : token.end] for token in tokens]
    spans = sorted({(token.start, token.end) for token in tokens})
    assert "".join(text[start:end] for start, end in spans) == text.replace(" ", "")
    assert [part for part, token in zip(read, tokens, strict=True) if token.ends_passage] == ["。"]
