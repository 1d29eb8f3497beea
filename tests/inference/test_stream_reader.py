"""Tests that a text read as a stream gives the segments, results and summary of the whole text, in constant memory."""

import copy
import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertJapaneseTokenizer, PreTrainedTokenizerFast

from recurrent_bart.commands.summarize import outputs
from recurrent_bart.data.batches import Collator, SegmentSizes
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import load_tokenizer, special_tokens_around, train_tokenizer
from recurrent_bart.inference import bookmark
from recurrent_bart.inference import stream_reader as inference
from recurrent_bart.inference.bookmark import LOOKAHEAD
from recurrent_bart.inference.stream_reader import TextReader, summary_after
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.recurrence.segmentation import pad_segments, split_into_segments

WORDS = dir(str) * 5
TEXTS = [f"the {word} of number {i} is returned as a list_{i % 7}({word})\n  it's" for i, word in enumerate(WORDS)]
TEXT = " ".join(TEXTS[:12])
# characters that tokenizers treat specially, so that a wrong cut next to them changes ids
SPACES = [" ", " ", "  ", "\n", "\n\n", "\t", "\x0c", "\x1c", "\x85", "\u00a0", "\u3000", "\u200b", "\u0301", "´"]
WORDS_AND_MARKS = ["▁", "Ġ", "don't", "'s", "foo", "123", "_x", "(", "...", "東京", "。", "🙂", "é", "ﬁ", "ﷺ", "¨"]
ATOMS = [*SPACES, *WORDS_AND_MARKS, "<mask>", "<s>"]


def byte_tokenizer(add_prefix_space, texts=TEXTS):
    """Return a byte-level BPE tokenizer like BART's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    ours = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    ours.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    return ours


@pytest.fixture(scope="module")
def unigram():
    return train_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture(scope="module", params=["unigram", "bpe", "bpe with a space in front"])
def tokenizer(request, unigram):
    return unigram if request.param == "unigram" else byte_tokenizer("space" in request.param)


@pytest.fixture
def make_reader(make_model, unigram):
    """Return a function that makes a reader of a tiny float64 model."""
    return lambda **changes: TextReader(make_model(vocab_size=len(unigram), **changes).requires_grad_(False), unigram)


@pytest.fixture
def read_segments(make_model, monkeypatch):
    """Return a function that streams pieces of a text and returns the segments read."""

    def read(tokenizer, pieces, **changes):
        reader = TextReader(make_model(vocab_size=len(tokenizer), encoder_layers=1, **changes), tokenizer)
        segments, encode = [], reader.model.model.encode

        def note(input_ids, mask, **kwargs):
            segments.extend(ids[is_token.bool()].tolist() for ids, is_token in zip(input_ids[0], mask[0], strict=True))
            return encode(input_ids, mask, **kwargs)

        monkeypatch.setattr(reader.model.model, "encode", note)
        read_all(reader, pieces)
        return segments

    return read


JAPANESE = """\
本日の会議を開きます。
「予算は足りますか？」と田中委員が質問しました。
はい。
ええ！？本当ですか。
３．５％の増額です．次に移ります．
東京都の予算案について、市長から説明がありました。
『よい。』「そう。」
　第一号議案。
ﾊﾟｿｺﾝを買う｡
BART 2024を使う。
か゛く゛…。
(笑)。
ありがとうございました、それでは次の議題に移りたいと思いますがよろしいでしょうか。
中文。
ไทย。
។ខ្មែរ។ខ្មែរ""".splitlines()


def japanese_tokenizer(kind, folder):
    """Return a tokenizer of Japanese text; `folder` holds the vocabulary of BertJapanese."""
    texts = ["".join(random.Random(number).choices(JAPANESE, k=9)) for number in range(30)]
    if kind == "unigram":
        return train_tokenizer(texts, vocab_size=520)
    if kind == "bpe":
        return byte_tokenizer(False, texts)
    pytest.importorskip("fugashi")
    pytest.importorskip("unidic_lite")
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *letters, *[f"##{letter}" for letter in letters]]
    vocabulary += ["予算", "東京", "会議", "委員", "です", "ます", "##した"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    options = {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    BertJapaneseTokenizer(str(folder / "vocab.txt"), **options).save_pretrained(folder / "saved")
    segmenter = "mecab" if kind == "unigram of words" else None
    if segmenter:
        train_tokenizer(texts, vocab_size=520).save_pretrained(folder / "saved")
    return load_tokenizer(str(folder / "saved"), word_segmenter=segmenter)


KINDS = ["unigram", "bpe", "BertJapanese", "unigram of words"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_text_without_spaces_has_the_segments_of_the_whole_text(kind, read_segments, tmp_path):
    tokenizer, chance = japanese_tokenizer(kind, tmp_path), random.Random(1)
    leading, trailing = special_tokens_around(tokenizer)
    for n_sentences in (1, 2, 3, 8, 20, 40):
        text = "".join(chance.choices(JAPANESE, k=n_sentences))
        ids = [*leading, *TextEncoder(tokenizer)([text])[0], *trailing]
        expected = split_into_segments(ids, segment_size=8, input_size=8)
        for size in (1, 7, 1000):
            assert read_segments(tokenizer, in_pieces(text, size), pad_token_id=tokenizer.pad_token_id) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_spaces_gives_its_first_segment_when_its_tokens_are_there(kind, make_model, tmp_path):
    tokenizer = japanese_tokenizer(kind, tmp_path)
    reader = TextReader(make_model(vocab_size=len(tokenizer), encoder_layers=1), tokenizer)
    n_read, n_waiting = 0, []
    for letter in "東京都の予算案について、市長から説明がありました。" * 20:
        n_read += sum(1 for _ in reader.feed(letter))
        n_waiting.append(len(reader.bookmark.text) + len(reader.bookmark.context))
    assert n_read > 10
    # the waiting text is at most two sentences and the characters behind them
    assert max(n_waiting) <= 4 * 25 + LOOKAHEAD


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_without_any_end_of_a_sentence_is_cut_where_its_ids_are_settled(kind, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(bookmark, "LONGEST_SENTENCE", 200)
    tokenizer, chance = japanese_tokenizer(kind, tmp_path), random.Random(2)
    parts = [
        "東京都の予算案",
        "市長から説明",
        "会議を",
        "ﾊﾟｿｺﾝ",
        "か゛く゛",
        "ありがとうございました",
        "３５％",
        "の",
        "中文",
    ]
    model = make_model(vocab_size=len(tokenizer), encoder_layers=1).requires_grad_(False)
    for size in (1, 13, 5000):
        text = "".join(chance.choices(parts, k=150))
        reader, seen = TextReader(model, tokenizer), []
        monkeypatch.setattr(reader, "_full_segments", lambda mark: iter(()))
        for piece in in_pieces(text, size):
            list(reader.feed(piece))
            seen.append(len(reader.bookmark.text))
        mark = reader.bookmark
        tokens = [*mark.tokens, *reader.cutter.waiting_tokens(mark)]
        assert [token.id for token in tokens] == TextEncoder(tokenizer)([text])[0]
        # characters of the tokens count from the beginning of the text
        assert [token[:3] for token in tokens] == [token[:3] for token in TextEncoder(tokenizer).tokens(text)]
        assert max(seen) <= 2 * 200
        assert mark.tokens
    # without settled ids, the text waits for its end
    monkeypatch.setattr(bookmark, "LONGEST_SENTENCE", 10**6)
    reader = TextReader(model, tokenizer)
    list(reader.feed(text))
    assert reader.bookmark.text == text


class CountingEncoder:
    """Encoder that counts the characters it is given."""

    def __init__(self, encoder):
        self.encoder, self.tokenizer, self.n_characters = encoder, encoder.tokenizer, 0

    def __call__(self, texts):
        self.n_characters += sum(map(len, texts))
        return self.encoder(texts)

    def tokens(self, text, behind=""):
        self.n_characters += len(text)
        return self.encoder.tokens(text, behind)


def long_words(n_characters):
    """Return texts without white space and ends of sentences, by name."""
    letters = "".join(random.Random(5).choices("abcdeABCDE0123456789+/", k=n_characters))
    repeated = {name: (name * n_characters)[:n_characters] for name in ("a", "!", "=", "the", "a.b", "東京都の予算")}
    return {"base64": letters, **repeated}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("name", long_words(1))
def test_a_text_without_spaces_is_tokenized_a_limited_number_of_times(kind, name, unigram):
    encoder = TextEncoder(unigram if kind == "unigram" else byte_tokenizer(False))
    text = long_words(3 * bookmark.LONGEST_SENTENCE)[name]
    # a text in small pieces costs about the same as a text at once
    for size in (100, len(text)):
        counting, mark = CountingEncoder(encoder), bookmark.Bookmark()
        cutter = bookmark.TextCutter(counting)
        for piece in in_pieces(text, size):
            mark.text += piece
            cutter.take_settled_text(mark)
        assert counting.n_characters < 60 * len(text), size
        assert [token.id for token in [*mark.tokens, *cutter.waiting_tokens(mark)]] == encoder([text])[0]


def test_a_text_whose_ids_never_settle_is_searched_a_limited_number_of_times(unigram, monkeypatch):
    encoder = CountingEncoder(TextEncoder(unigram))
    cutter, mark = bookmark.TextCutter(encoder), bookmark.Bookmark()
    monkeypatch.setattr(bookmark, "LONGEST_SENTENCE", 200)
    monkeypatch.setattr(cutter, "_settled", lambda text: ([], encoder([text] * LOOKAHEAD)[0]))
    for letter in "a" * 1000:
        mark.text += letter
        cutter.take_settled_text(mark)
    assert len(mark.text) == 1000
    assert encoder.n_characters < 200 * 1000


def test_a_long_text_without_spaces_is_tokenized_in_steps(make_reader, monkeypatch):
    monkeypatch.setattr(inference, "PIECE", 512)
    monkeypatch.setattr(bookmark, "LONGEST_SENTENCE", 256)
    reader, n_waiting = make_reader(), []
    for _ in reader.feed_in_steps("a" * 3 * inference.PIECE):
        n_waiting.append(reader.bookmark.n_characters)
    assert n_waiting[:3] == [inference.PIECE, 2 * inference.PIECE, 3 * inference.PIECE]


@pytest.mark.slow
def test_a_state_file_inside_japanese_text_continues_it(make_model, tmp_path):
    tokenizer = japanese_tokenizer("unigram", tmp_path)
    text = "".join(random.Random(3).choices(JAPANESE, k=40)).replace(" ", "")
    model = make_model(vocab_size=len(tokenizer)).requires_grad_(False)
    for place in (100, 203, 350):
        first, second = TextReader(model, tokenizer), TextReader(model, tokenizer)
        read_all(first, in_pieces(text[:place], 30))
        assert first.bookmark.context
        first.save(tmp_path / "state")
        second.load(tmp_path / "state")
        assert_equal_to_1e_12(read_all(second, in_pieces(text[place:], 30)), read_at_once(first, text))


def in_pieces(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


def read_all(reader, pieces):
    """Feed all pieces and return the last output."""
    for piece in pieces:
        for _ in reader.feed(piece):
            pass
    return list(reader.finish())[-1]


def read_at_once(reader, text):
    """Encode the whole text with the model directly."""
    ids = torch.tensor([reader.tokenizer(text, verbose=False)["input_ids"]])
    return reader.model.model.encode(ids)


def assert_equal_to_1e_12(streamed, whole):
    context = whole.last_hidden_state
    # in the whole text the last segment is padded to the longest segment
    torch.testing.assert_close(
        streamed.last_hidden_state, context[:, : streamed.last_hidden_state.shape[1]], rtol=0, atol=1e-12
    )
    found, expected = (without_padding(output.state.tensors()) for output in (streamed, whole))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_streamed_segments_equal_the_segments_of_the_whole_text(tokenizer, read_segments):
    chance = random.Random(0)
    texts = ["".join(chance.choices(ATOMS, k=chance.randint(1, 60))) for _ in range(15)]
    for text in [TEXT, *texts]:
        # text never becomes a special token, and white space at the end is not read
        ids = [0, *TextEncoder(tokenizer)([text.rstrip()])[0], 2]
        if len(ids) > 2:
            pieces = in_pieces(text, chance.choice([1, 5, 1000]))
            assert read_segments(tokenizer, pieces) == split_into_segments(ids, segment_size=8, input_size=8)


@pytest.mark.parametrize("n_words", [1, 2, 3, 4, 5, 6, 7, 12, 13, 40])
def test_streamed_segments_have_their_overlap_at_every_text_length(n_words, unigram, read_segments):
    text = " ".join("abcdefghij"[i % 10] for i in range(n_words))
    ids = unigram(text)["input_ids"]
    segments = read_segments(unigram, in_pieces(text, 3), segment_size=6, input_size=16)
    assert segments == split_into_segments(ids, segment_size=6, input_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": 11},
        {"recurrence": "top"},
        {"recurrence": "none"},
        {"pre_seq_len": 0},
        {"prefix_attention": "concat"},
        {"decoder_context": "memory"},
        {"decoder_context": "all"},
        {"decoder_context": "section"},
    ],
    ids=str,
)
def test_streamed_text_gives_the_same_output_as_the_whole_text(changes, make_reader):
    reader = make_reader(**changes)
    assert_equal_to_1e_12(read_all(reader, in_pieces(TEXT, 50)), read_at_once(reader, TEXT))
    n_tokens = len(reader.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert reader.n_tokens == n_tokens
    # the end is encoded again, but not counted again
    read_all(reader, [])
    assert reader.n_tokens == n_tokens


@pytest.mark.parametrize(
    "segments_per_call", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow), 32]
)
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), {"input_size": 11}, {"decoder_context": "all"}],
    ids=str,
)
def test_segments_read_in_one_call_give_the_same_output_as_the_whole_text(
    changes, segments_per_call, make_reader, monkeypatch
):
    reader, sizes = make_reader(schedule="wavefront", **changes), []
    expected, encode = read_at_once(reader, TEXT), reader.model.model.encode

    def note(input_ids, *rest, **kwargs):
        sizes.append(input_ids.shape[1])
        return encode(input_ids, *rest, **kwargs)

    monkeypatch.setattr(reader.model.model, "encode", note)
    reader.segments_per_call = segments_per_call
    assert_equal_to_1e_12(read_all(reader, [TEXT]), expected)
    n_segments = int(expected.state.position)
    assert max(sizes) == min(segments_per_call, n_segments - 1)
    assert sum(sizes) == reader.n_segments == n_segments
    assert len(sizes) == -(-(n_segments - 1) // segments_per_call) + 1


@pytest.mark.slow
def test_streamed_text_gives_the_same_summary_as_the_whole_text(make_reader):
    reader = make_reader()
    ids = torch.tensor([reader.tokenizer(TEXT)["input_ids"]])
    for how in ({}, {"num_beams": 3}):
        whole = reader.model.generate(ids, max_new_tokens=12, **how)
        streamed = read_all(TextReader(reader.model, reader.tokenizer), [TEXT])
        text = summary_after(streamed, reader.model, reader.tokenizer, max_new_tokens=12, **how)
        assert text
        assert text == reader.tokenizer.decode(whole[0], skip_special_tokens=True).strip()


# in the first word, at a space, after one, inside a word, at the end
@pytest.mark.slow
@pytest.mark.parametrize("place", [2, TEXT.index(" ", 60), TEXT.index(" ", 60) + 1, 203, len(TEXT) - 1])
def test_two_halves_joined_by_a_state_file_equal_the_whole_text(place, make_reader, tmp_path):
    first = make_reader(input_size=11)
    read_all(first, in_pieces(TEXT[:place], 30))
    first.save(tmp_path / "state")
    second = TextReader(first.model, first.tokenizer)
    second.load(tmp_path / "state")
    assert_equal_to_1e_12(read_all(second, in_pieces(TEXT[place:], 30)), read_at_once(first, TEXT))
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


@pytest.mark.slow
def test_a_finished_text_can_be_continued(make_reader):
    reader = make_reader()
    half = len(TEXT) // 2
    assert_equal_to_1e_12(read_all(reader, [TEXT[:half]]), read_at_once(reader, TEXT[:half]))
    assert_equal_to_1e_12(read_all(reader, [TEXT[half:]]), read_at_once(reader, TEXT))


SECTIONS = [" ".join(TEXTS[:1]), " ".join(TEXTS[1:6]), "it", " ".join(TEXTS[6:9])]


def contexts_of_sections(reader, sections):
    """Read the sections as training does, all at once; return the decoder's context after each section."""
    leading, trailing = special_tokens_around(reader.tokenizer)
    config = reader.model.config
    sizes = SegmentSizes(config.segment_size, config.input_size, max_n_segments=-1)
    collator = Collator("sections", sizes, leading, trailing, config.pad_token_id, max_target_length=9)
    ids = TextEncoder(reader.tokenizer)(sections)
    batch = collator([{"index": 0, "sections": ids, "summaries": [[5]] * len(ids)}])
    ends = (batch.labels != IGNORED).any(dim=-1)
    output = reader.model.model.encode(batch.input_ids, batch.attention_mask, target_segments=ends)
    hidden, mask = output.last_hidden_state, output.context_mask.bool()
    return [context[is_seen] for context, is_seen in zip(hidden, mask, strict=True)], output.state


@pytest.mark.slow
@pytest.mark.parametrize("segments_per_call", [1, 32])
@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_context": "section"},
        {"decoder_context": "section", "input_size": 11},
        {"decoder_context": "section", "context_segments": 2},
        {"decoder_context": "section", "pre_seq_len": 0},
        {"decoder_context": "last"},
        {"decoder_context": "memory"},
        {"decoder_context": "all"},
    ],
    ids=str,
)
def test_streamed_sections_have_the_contexts_of_training(changes, segments_per_call, make_reader):
    reader = make_reader(**changes)
    reader.segments_per_call = segments_per_call
    expected, state = contexts_of_sections(reader, SECTIONS)
    for section, context in zip(SECTIONS, expected, strict=True):
        assert reader.is_between_sections
        for piece in in_pieces(section, 30):
            assert all(not reader.is_between_sections for _ in reader.feed(piece))
        *_, output = reader.end_section()
        streamed = output.last_hidden_state[0, output.context_mask[0].bool()]
        torch.testing.assert_close(streamed, context, rtol=0, atol=1e-12)
    assert list(reader.end_section()) == []
    streamed, whole = (without_padding(state.tensors()) for state in (reader.bookmark.state, state))
    for name, tensor in whole.items():
        torch.testing.assert_close(streamed[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_each_section_has_the_text_of_its_target_segment(make_reader):
    reader = make_reader(decoder_context="section")
    leading, trailing = special_tokens_around(reader.tokenizer)
    ids = [[*leading, *section, *trailing] for section in TextEncoder(reader.tokenizer)(SECTIONS[:3])]
    segments = [split_into_segments(section, segment_size=8, input_size=8) for section in ids]
    input_ids = pad_segments([list(itertools.chain(*segments))], padding=1)
    ends = torch.tensor([list(itertools.chain(*([False] * (len(own) - 1) + [True] for own in segments)))])
    texts = reader.model.generate(
        input_ids, attention_mask=(input_ids != 1).long(), target_segments=ends, max_new_tokens=9
    )
    expected = [text.strip() for text in reader.tokenizer.batch_decode(texts.flatten(0, -2), skip_special_tokens=True)]
    found = []
    for section in SECTIONS[:3]:
        # line ends after a section, as in a file, are not of the section
        list(reader.feed(section + "\n"))
        *_, output = reader.end_section()
        found.append(summary_after(output, reader.model, reader.tokenizer, max_new_tokens=9))
    assert found == [text for text in expected if text]
    assert len(set(found)) > 1


def without_padding(tensors):
    """Leave out padding of the carried context and tokens: its size depends on how a text is read."""
    is_kept = {"context": tensors.get("context_number", 0) != 0, "tokens": tensors.get("tokens_mask")}
    return {
        name: tensor[is_kept[name.split("_")[0]]] if name.startswith(("context", "tokens")) else tensor
        for name, tensor in tensors.items()
    }


def test_a_section_can_be_continued_from_a_state_file(make_reader, tmp_path):
    whole = make_reader(decoder_context="section")
    expected, _ = contexts_of_sections(whole, SECTIONS[:2])
    first, second = (TextReader(whole.model, whole.tokenizer) for _ in range(2))
    list(first.feed(SECTIONS[0]))
    list(first.end_section())
    list(first.feed(SECTIONS[1][:40]))
    # the summary of a section so far changes nothing
    list(first.finish())
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    list(second.feed(SECTIONS[1][40:]))
    *_, output = second.finish()
    torch.testing.assert_close(output.last_hidden_state[0], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n", "\n" * 9, "\n***", "\n***\n\n"], ids=repr)
def test_the_last_section_is_read_as_in_training(end, make_model):
    """A byte-level tokenizer has a token for a line end."""
    tokenizer = byte_tokenizer(add_prefix_space=False)
    model = make_model(vocab_size=len(tokenizer), decoder_context="section")
    expected, _ = contexts_of_sections(TextReader(model, tokenizer), SECTIONS[:2])
    reader = TextReader(model, tokenizer)
    *_, last = outputs(reader, iter(["\n***\n".join(SECTIONS[:2]) + end]), "***")
    torch.testing.assert_close(last.last_hidden_state[0, last.context_mask[0].bool()], expected[1])
    assert reader.n_tokens == sum(map(len, TextEncoder(tokenizer)(SECTIONS[:2])))


def test_the_line_end_of_an_unfinished_section_stays_in_the_bookmark(make_model):
    tokenizer = byte_tokenizer(add_prefix_space=False)
    model = make_model(vocab_size=len(tokenizer), decoder_context="section")
    (expected,), _ = contexts_of_sections(TextReader(model, tokenizer), ["\n".join(SECTIONS[:2])])
    reader = TextReader(model, tokenizer)
    for text in (f"{SECTIONS[0]}\n", SECTIONS[1]):
        *_, last = outputs(reader, iter([text]), "***")
    torch.testing.assert_close(last.last_hidden_state[0, last.context_mask[0].bool()], expected)


@pytest.mark.parametrize("separator", [None, "***"])
def test_a_line_end_at_the_end_of_a_text_is_not_read(make_model, separator):
    tokenizer = byte_tokenizer(add_prefix_space=False)
    reader = TextReader(make_model(vocab_size=len(tokenizer)), tokenizer)
    list(outputs(reader, iter([f"{SECTIONS[0]}\n"]), separator))
    assert reader.n_tokens == len(TextEncoder(tokenizer)([SECTIONS[0]])[0])


@pytest.mark.slow
def test_a_state_of_a_different_model_is_refused(make_reader, tmp_path):
    path = tmp_path / "state"
    reader = make_reader()
    read_all(reader, [TEXT])
    reader.save(path)
    with pytest.raises(
        ValueError, match=r"state was saved with a different model: segment_size is 8 in the file, 9 in this model"
    ):
        make_reader(segment_size=9).load(path)
    with pytest.raises(ValueError, match=r"a different model: weights is '\w+' in the file, '\w+' in this model"):
        make_reader().load(path)
    other = TextReader(reader.model, train_tokenizer(TEXTS[:50], vocab_size=len(reader.tokenizer) - 20))
    with pytest.raises(ValueError, match="a different model: tokenizer is"):
        other.load(path)
    in_float32 = TextReader(reader.model.float(), reader.tokenizer)
    in_float32.load(path)
    assert in_float32.bookmark.state.memory.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_the_same_in_every_precision_and_others_are_not(make_reader, dtype):
    model = make_reader().model.float()
    # float32 values that bfloat16 has to round
    for parameter in model.parameters():
        parameter.data.uniform_(0.5, 1.0)
    before = inference.weights_identity(model)
    assert inference.weights_identity(copy.deepcopy(model).to(dtype)) == before
    list(model.parameters())[-1].data.view(-1)[0] += 0.1
    assert inference.weights_identity(model) != before


# for each configuration field that the values of a state depend on: another value
OTHER_FIELDS = {
    "pre_seq_len": 4,
    "d_model": 32,
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "activation_function": "relu",
    "scale_embedding": True,
    "recurrence": "top",
    "prefix_attention": "gated",
    "prefix_projection": False,
    "update_gate": False,
    "associative_memory": True,
    "decoder_context": "section",
    "context_segments": 2,
    "segment_size": 9,
    "input_size": 11,
}


def test_the_table_of_this_file_holds_the_fields_that_a_state_depends_on():
    assert OTHER_FIELDS.keys() == set(inference.STATE_FIELDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_FIELDS)
def test_a_state_of_a_model_that_differs_in_one_field_is_refused(make_reader, tmp_path, name):
    """Change a field only in the configuration, so that the weights are the same."""
    path = tmp_path / "state"
    reader = make_reader(prefix_attention="concat", decoder_context="all")
    read_all(reader, [TEXT])
    reader.save(path)
    reader.load(path)
    assert getattr(reader.model.config, name) != OTHER_FIELDS[name]
    setattr(reader.model.config, name, OTHER_FIELDS[name])
    with pytest.raises(ValueError, match=f"the state was saved with a different model: {name} is"):
        reader.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"encoder_attention_heads": 2}, {"activation_function": "relu"}], ids=str)
def test_fields_that_no_weight_shows_change_the_state(make_reader, changes):
    readers = []
    for fields in ({}, changes):
        torch.manual_seed(0)
        readers.append(make_reader(prefix_attention="concat", **fields))
    first, other = (inference.weights_identity(reader.model) for reader in readers)
    assert first == other
    states = [read_all(reader, [TEXT]).state.memory for reader in readers]
    assert not torch.allclose(*states, atol=0.01)


def test_a_file_without_a_state_is_refused(make_reader, tmp_path):
    reader = make_reader()
    (tmp_path / "text").write_text(TEXT)
    reader.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="text: the saved state cannot be read"):
        reader.load(tmp_path / "text")
    with pytest.raises(ValueError, match="missing: the saved state cannot be read"):
        reader.load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"safetensors: not a saved state: format .* found"):
        reader.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be written"):
        reader.save(tmp_path / "text" / "state")


@pytest.mark.parametrize("name", ["reader", "notes", "counts"])
@pytest.mark.parametrize("value", ["[" * 200_000, "[]", "{"])
def test_a_state_with_wrong_metadata_is_refused(make_reader, tmp_path, name, value):
    reader = make_reader()
    reader.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        metadata = file.metadata() | {name: value}
    save_file(load_file(tmp_path / "state"), tmp_path / "wrong", metadata)
    with pytest.raises(ValueError, match="wrong: not a saved state"):
        reader.load(tmp_path / "wrong")


def test_an_empty_text_is_refused(make_reader):
    for pieces in ([], ["", " \n "]):
        with pytest.raises(ValueError, match="the text has no tokens"):
            read_all(make_reader(), pieces)


def test_a_very_long_word_is_cut(make_reader, monkeypatch):
    monkeypatch.setattr(bookmark, "LONGEST_WORD", 100)
    reader = make_reader()
    for _ in range(10):
        list(reader.feed("x" * 50))
        assert len(reader.bookmark.text) <= 100
    assert reader.n_segments > 5


@pytest.mark.slow
def test_a_stream_of_a_million_tokens_takes_constant_memory(make_reader):
    one_of_each = {"encoder_layers": 1, "encoder_attention_heads": 1}
    reader = make_reader(segment_size=512, max_position_embeddings=512, input_size=512, **one_of_each)
    reader.model.float()
    early, text = None, (TEXT + " ") * 10
    while reader.n_tokens < 1_000_000:
        for _ in reader.feed(text):
            pass
        if early is None and reader.n_tokens > 200_000:
            early = resident_bytes()
    last = list(reader.finish())[-1]
    assert last.state.position == reader.n_segments > 1900
    # the ids read in between would take 28 MB, the segments' outputs 51 MB
    assert resident_bytes() - early < 8e6


def resident_bytes():
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("counts", ['{"position": 1}', '{"position": -1, "n_tokens": 0, "n_segments": 0}'])
def test_a_state_with_wrong_counts_is_refused(make_reader, tmp_path, counts):
    reader = make_reader()
    reader.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        metadata = file.metadata() | {"counts": counts}
    save_file(load_file(tmp_path / "state"), tmp_path / "wrong", metadata)
    with pytest.raises(ValueError, match="wrong: not a saved state: its counts must be whole numbers"):
        reader.load(tmp_path / "wrong")
