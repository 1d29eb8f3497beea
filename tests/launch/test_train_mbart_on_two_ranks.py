"""A run of `--task sections` from an MBart on two ranks under ZeRO-3, in English and in Japanese."""

import json

import pytest
import torch
from safetensors.torch import load_file

from launching import TESTS, load_script, torchrun
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.data.word_segmenter import WordSegmenter
from runs import WORDS, flags
from tiny import plain_model

LAUNCH = TESTS.parent / "launch"
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


# starts two ranks four times
@pytest.mark.timeout(900)
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
    for folder in (whole, cut):
        code, printed = torchrun(2, LAUNCH / "train.py", *flags(written, folder, **given))
        assert code == 0, printed
    (cut / "checkpoints" / "step-00000004").rename(tmp_path / "taken away")
    code, printed = torchrun(2, LAUNCH / "train.py", "--resume", cut)
    assert code == 0, printed
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, cut))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    model = ["--model", str(whole / "model")]
    code, printed = torchrun(2, LAUNCH / "evaluate.py", *model, "--json", tmp_path / "scores.json")
    assert code == 0, printed
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert ("rouge1_words" in scores) == (language == "Japanese")
    (tmp_path / "text.txt").write_text("\n====\n".join(SENTENCES[language][:3]))
    capsys.readouterr()
    assert load_script("summarize").main([*model, "--section_separator", "====", str(tmp_path / "text.txt")]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3
