"""Japanese texts are segmented into words before they are tokenised, and joined again in the output."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from launching import load_script
from recurrent_bart.data import word_segmenter
from recurrent_bart.data.corpus import load_corpus
from recurrent_bart.data.gap_sentences import GAP
from recurrent_bart.data.rows import Columns
from recurrent_bart.data.sources import find_sources
from recurrent_bart.data.text_encoder import TextEncoder, decode_text
from recurrent_bart.data.tokenizer import load_tokenizer, train_tokenizer
from recurrent_bart.data.tokenizer_identity import tokenizer_identity
from recurrent_bart.data.word_segmenter import PART, WordSegmenter, is_segmented, join_words
from recurrent_bart.evaluation.rouge import remember_words, rouge_per_sample
from recurrent_bart.run_folder import RunFolder
from runs import flags

TEXT = "京都大学でBARTを学ぶ。2024年、「New York」へ行く。"
WORDS = {
    "mecab": "京都 大学 で BART を 学ぶ 。 2024 年 、 「 New York 」 へ 行く 。",
    "sudachi": "京都大学 で BART を 学ぶ 。 2024 年 、 「 New York 」 へ 行く 。",
    # the stand-in puts a space after each character
    "jumanpp": "京 都 大 学 で BART を 学 ぶ 。 2024 年 、 「 New York 」 へ 行 く 。",
}
STAND_IN = """#!{python}
import sys
assert sys.argv[1:] in (["--segment"], ["--version"])
if sys.argv[1] == "--version":
    print("Juman++ stand-in 1")
else:
    for line in sys.stdin.buffer:
        print(" ".join(line.decode().strip()), flush=True)
"""


@pytest.fixture
def jumanpp(tmp_path, monkeypatch):
    """Put a stand-in of Juman++ on the PATH."""
    program = tmp_path / "programs" / "jumanpp"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    return program


@pytest.fixture(params=WORDS)
def name(request, jumanpp):
    for package in {"mecab": ["fugashi", "unidic_lite"], "sudachi": ["sudachipy"]}.get(request.param, []):
        pytest.importorskip(package)
    return request.param


@pytest.fixture
def folder(tmp_path):
    """Write a tokenizer that knows Japanese letters, and training documents."""
    train_tokenizer([TEXT] * 9, vocab_size=340).save_pretrained(tmp_path / "tokenizer")
    for split in ("train", "validation"):
        line = f'{{"document": "{TEXT}", "summary": "京都大学で学ぶ。"}}\n'
        (tmp_path / f"{split}.jsonl").write_text(line * 2)
    return tmp_path


def test_spaces_stand_between_words_and_go_again(name):
    assert WordSegmenter(name)([TEXT, "no Japanese, 3.5", ""]) == [WORDS[name], "no Japanese, 3.5", ""]
    assert join_words(WORDS[name]) == TEXT


def test_white_space_of_the_text_stays(name):
    (text,) = WordSegmenter(name)(["　本日は。\n\nthe day　ＡＢＣ ＤＥＦ  x"])
    assert join_words(text) == "　本日は。\n\nthe day　ＡＢＣ ＤＥＦ  x"


def test_a_sentence_has_the_same_words_in_every_text(name):
    segment = WordSegmenter(name)
    first, second = "東京都に行く。", "「寒い！」と言った。"
    assert segment([first + second]) == [f"{segment([first])[0]} {segment([second])[0]}"]
    long = "東京都" * 500
    assert segment([long + "x"])[0].replace(" ", "") == long + "x"


def test_large_texts_are_segmented_in_processes_to_the_same_words(name, monkeypatch):
    texts = [f"京都大学で{number}年に学ぶ。the end" for number in range(50)]
    expected = WordSegmenter(name)(texts)
    monkeypatch.setattr(word_segmenter, "PROCESS_CHARACTERS", 100)
    monkeypatch.setattr(word_segmenter, "_segment_parts", None)
    assert WordSegmenter(name, n_processes=2)(texts) == expected


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("京都 大学 で BART を 使う 。", "京都大学でBARTを使う。"),
        ("New York の the end 。", "New Yorkのthe end。"),
        ("한국어 문장 은", "한국어 문장 은"),
        ("ＡＢＣ ＤＥＦ 社", "ＡＢＣ ＤＥＦ社"),
        ("ﾊﾟｿｺﾝ です （ 株 ） ！", "ﾊﾟｿｺﾝです（株）！"),
    ],
)
def test_spaces_between_japanese_words_go_and_other_spaces_stay(words, text):
    assert join_words(words) == text


def test_segmented_text_is_recognised():
    assert is_segmented(WORDS["mecab"])
    assert not is_segmented(TEXT)
    assert not is_segmented("これは a test です。 次の文です。 the words of an English text")
    assert not is_segmented("")


def test_the_segmenter_is_saved_with_the_tokenizer_and_changes_its_ids(name, folder):
    plain = load_tokenizer(str(folder / "tokenizer"))
    segmenting = load_tokenizer(str(folder / "tokenizer"), word_segmenter=name)
    segmenting.save_pretrained(folder / "saved")
    saved = load_tokenizer(str(folder / "saved"))
    assert tokenizer_identity(saved) == tokenizer_identity(segmenting) != tokenizer_identity(plain)
    (ids,) = TextEncoder(saved)([TEXT])
    assert ids == TextEncoder(plain)([WORDS[name]])[0] != TextEncoder(plain)([TEXT])[0]
    assert decode_text(saved, ids) == TEXT
    assert decode_text(plain, ids) == WORDS[name]
    mask = saved.mask_token_id
    assert TextEncoder(saved)([f"{TEXT}{GAP}{TEXT}"]) == [[*ids, mask, *ids]]


def test_a_corpus_holds_segmented_texts_and_each_segmenter_has_its_cache(name, folder):
    source = find_sources("stdlib", *[str(folder / "train.jsonl")] * 2)["train"]
    said = []
    for segmenter in ("none", name):
        tokenizer = load_tokenizer(str(folder / "tokenizer"), word_segmenter=segmenter)
        rows, *_ = load_corpus(source, "document", Columns(), tokenizer, folder, said.append)
        assert rows[0]["sections"] == TextEncoder(tokenizer)([TEXT])
        assert rows[0]["summary_texts"] == ["京都大学で学ぶ。"]
    assert len([*(folder / "corpora").iterdir()]) == 2
    assert not [line for line in said if line.startswith("warning")]


def test_a_segmented_document_is_named_in_one_line(name, folder):
    path = folder / "words.jsonl"
    path.write_text(f'{{"document": "{WORDS["mecab"]}", "summary": "学ぶ"}}\n' * 3)
    tokenizer, said = load_tokenizer(str(folder / "tokenizer"), word_segmenter=name), []
    source = find_sources("stdlib", train_file=str(path), validation_file=str(path))["train"]
    load_corpus(source, "document", Columns(), tokenizer, folder, said.append)
    (line,) = [line for line in said if line.startswith("warning")]
    assert "words.jsonl:1: spaces stand between its Japanese words already" in line


def test_a_segmenter_that_is_missing_or_fails_is_named_with_the_remedy(folder, jumanpp, monkeypatch):
    with pytest.raises(ValueError, match="--word_segmenter kytea: allowed are none, jumanpp, mecab, sudachi"):
        load_tokenizer(str(folder / "tokenizer"), word_segmenter="kytea")
    jumanpp.write_text("#!/bin/sh\necho no dictionary >&2\nexit 3\n")
    with pytest.raises(ValueError, match=r"jumanpp --segment: .* ended with code 3 and .*no dictionary"):
        WordSegmenter("jumanpp")(["寒い。"])
    jumanpp.unlink()
    with pytest.raises(ValueError, match="--word_segmenter jumanpp: it is not installed; install Juman"):
        load_tokenizer(str(folder / "tokenizer"), word_segmenter="jumanpp")
    monkeypatch.setitem(word_segmenter.PACKAGES, "mecab", ("no-such-package",))
    with pytest.raises(ValueError, match="--word_segmenter mecab: it is not installed; run pip install fugashi"):
        WordSegmenter("mecab")


def test_a_tokenizer_that_segments_words_itself_gets_no_segmenter(tmp_path):
    pytest.importorskip("fugashi")
    pytest.importorskip("unidic_lite")
    from transformers import BertJapaneseTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "京都", "大学"]))
    options = {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), **options).save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(str(tmp_path / "saved"))
    assert decode_text(tokenizer, TextEncoder(tokenizer)(["京都大学"])[0]) == "京都大学"
    with pytest.raises(ValueError, match=r"--word_segmenter mecab: the tokenizer of .* has its own; remove it"):
        load_tokenizer(str(tmp_path / "saved"), word_segmenter="mecab")


def test_rouge_starts_the_segmenter_once_for_all_texts(jumanpp, monkeypatch):
    texts = ["京都大学で学ぶ。寒い。"] * 2 + ["「New York」へ行く。", "BART を学ぶ。", "English only."]
    expected = rouge_per_sample(texts, texts[::-1], "jumanpp")
    started, start = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: started.append(given[0]) or start(*given, **more))
    found = rouge_per_sample(texts, texts[::-1], "jumanpp")
    assert len(started) == 1
    assert all((found[name] == values).all() for name, values in expected.items())
    segmenter = WordSegmenter("jumanpp")
    remember_words(segmenter, texts)
    started.clear()
    for text in texts:
        rouge_per_sample([text], [[text, texts[0]]], segmenter)
    assert not started


@pytest.mark.slow
def test_a_run_resumes_evaluates_and_summarises_with_its_segmenter(name, folder, train_main, capsys):
    run, text = folder / "run", folder / "text.txt"
    text.write_text(TEXT)
    arguments = flags(folder, run, word_segmenter=name, max_steps=2, max_n_segments=-1)
    assert train_main(arguments) == 0
    assert train_main(["--resume", str(run), "--max_steps", "3"]) == 0
    capsys.readouterr()
    other = ["--resume", str(run), "--word_segmenter", "none"]
    assert train_main(other) == 2
    assert "--word_segmenter none: the run was started with" in capsys.readouterr().err
    model = RunFolder(run).model
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.init_kwargs["word_segmenter"] == name
    for every in ([], ["--every_segment"]):
        torch.manual_seed(0)
        assert load_script("summarize").main(["--model", str(model), *every, str(text)]) == 0
    assert load_script("evaluate").main(["--model", str(model), "--word_segmenter", "none"]) == 2
    assert f"--word_segmenter none: must be {name}" in capsys.readouterr().err
    assert load_script("evaluate").main(["--model", str(model)]) == 0


@pytest.mark.parametrize("sign", ["。", "．", "！", "?", "!"])
def test_every_sign_that_ends_a_japanese_sentence_ends_a_part(sign):
    assert PART.findall(f"研究した{sign}" * 400) == [f"研究した{sign}"] * 400


def test_signs_that_end_no_japanese_sentence_end_no_part():
    assert PART.findall("約３．５度") == ["約３．５度"]
    assert PART.findall("see v1.2!x") == ["see", "v1.2!x"]


def test_a_segmenter_serves_one_thread_at_a_time(monkeypatch):
    running, most = [], []

    def segment(parts):
        running.append(parts)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return list(parts)

    monkeypatch.setattr(word_segmenter, "_segmenter_of", lambda name: segment)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda text: word_segmenter._segment_parts("mecab", [text]), "京都大学"))
    assert most == [1, 1, 1, 1]
