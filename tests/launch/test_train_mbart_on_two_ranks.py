"""A run of `--task sections` from an MBart on two ranks under ZeRO-3, in English and in Japanese."""

import json

import pytest
import torch

from forked import launched, run_script
from launching import load_script
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.data.word_segmenter import WordSegmenter
from runs import WORDS, cut_off, flags
from saved_tensors import differing, saved_tensors
from tiny import plain_model

SENTENCES = {
    "English": [f"The {word} is here." for word in WORDS],
    "Japanese": [f"{word}の予算を増額します。" for word in ("学校", "道路", "病院", "公園", "防災", "観光")] * 2,
}
SEGMENTERS = {"English": "none", "Japanese": "mecab"}


@pytest.fixture(params=SENTENCES)
def language(request):
    if request.param == "Japanese":
        pytest.importorskip("fugashi")
        pytest.importorskip("unidic_lite")
    return request.param


@pytest.fixture
def written(language, tmp_path):
    """Write documents with sections as lists of sentences, and a checkpoint of MBart with its tokenizer."""
    sentences = SENTENCES[language]
    for split, n_documents in (("train", 8), ("validation", 3)):
        with (tmp_path / f"{split}.jsonl").open("w") as file:
            for number in range(n_documents):
                sections = [sentences[number % 6 : number % 6 + 3], sentences[1:3]]
                record = {"sections": sections, "abs_incremental": [[section[0]] for section in sections]}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    segmenter = SEGMENTERS[language]
    texts = sentences if segmenter == "none" else WordSegmenter(segmenter)(sentences)
    tokenizer = train_tokenizer(texts * 5, 320)
    torch.manual_seed(0)
    model = plain_model("mbart", vocab_size=len(tokenizer), dropout=0.1, decoder_start_token_id=2)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path


def start(script, *arguments):
    """Run a script on two ranks."""
    ended = run_script(f"launch/{script}.py", *arguments, environments=launched(2))
    assert ended.codes == [0, 0], ended.text()


@pytest.mark.distributed
@pytest.mark.slow
def test_it_trains_resumes_bit_for_bit_evaluates_and_summarises(language, written, tmp_path, capsys):
    given = {
        "model_name_or_path": written / "checkpoint",
        "task": "sections",
        "summaries_column": "abs_incremental",
        "word_segmenter": SEGMENTERS[language],
        "deepspeed": "ds_configs/zero3.json",
        "per_device_train_batch_size": 1,
        "max_steps": 4,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start("train", *flags(written, whole, **given))
    cut_off(whole, cut)
    start("train", "--resume", cut)
    found, expected = (saved_tensors(run / "checkpoints" / "step-00000004") for run in (cut, whole))
    assert not differing(found, expected)
    assert any("exp_avg" in name for name in expected)
    model = ["--model", str(whole / "model")]
    start("evaluate", *model, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert ("rouge1_words" in scores) == (language == "Japanese")
    (tmp_path / "text.txt").write_text("\n====\n".join(SENTENCES[language][:3]))
    capsys.readouterr()
    assert load_script("summarize").main([*model, "--section_separator", "====", str(tmp_path / "text.txt")]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3
