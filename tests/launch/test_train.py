"""`launch/train.py` with every launcher and DeepSpeed configuration, both tasks, and invalid input."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from forked import launched, run_script
from launching import deepspeed, run
from recurrent_bart.data.tokenizer import save_tokenizer, train_tokenizer
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from runs import WORDS, flags

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
COMMAND = ROOT / "recurrent_bart_cli.py"
FOLDERS = [
    "checkpoints",
    "config.json",
    "curves.png",
    "metrics.jsonl",
    "model",
    "outcome.json",
    "predictions.jsonl",
    "samples.md",
    "tokenizer",
]


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summarise(folder):
    """Return the saved model's summary of a text; the Auto classes load everything."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, RecurrentBartForConditionalGeneration)
    ids = tokenizer(" ".join(WORDS * 4), return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, max_new_tokens=4)[0])


def assert_one_error(printed, *parts):
    lines = [line for line in printed.splitlines() if "error" in line.lower() and "ChildFailedError" not in line]
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1, printed
    assert all(part in errors[0] for part in parts), errors[0]
    assert "Traceback" not in printed.split("torch/distributed")[0], printed


@pytest.fixture(scope="module")
def two_processes(documents, tmp_path_factory):
    """Train on two ranks with ZeRO-3 and the deepspeed launcher; return the run's folder and its output."""
    folder = tmp_path_factory.mktemp("runs") / "deepspeed"
    arguments = flags(documents, folder, deepspeed="ds_configs/zero3.json", dataloader_num_workers=1, log_every=2)
    code, printed = deepspeed(TRAIN, *arguments, LOCAL_SIZE="2")
    assert code == 0, printed
    return folder, printed


@pytest.mark.distributed
@pytest.mark.slow
class TestTwoProcesses:
    def test_the_folder_has_all_that_a_run_leaves(self, two_processes):
        folder, printed = two_processes
        assert sorted(path.name for path in folder.iterdir()) == FOLDERS
        assert "2 per device x 1 accumulated x 2 processes" in printed
        assert "ZeRO-3" in printed

    def test_cut_targets_are_said(self, two_processes):
        _, printed = two_processes
        cut = re.search(
            r"^cut +(\d+) of 24 \([\d.]+ %\) training targets after 8 tokens.*--max_target_length", printed, re.M
        )
        assert cut, printed
        assert 0 < int(cut[1]) <= 24

    def test_one_process_speaks(self, two_processes):
        _, printed = two_processes
        for text in ("step 0: validation loss", "step 2/6", "model in "):
            assert sum(text in line for line in printed.splitlines()) == 1, text

    def test_the_configuration_is_resolved(self, two_processes):
        config = json.loads((two_processes[0] / "config.json").read_text())
        assert config["model"]["segment_size"] == 16
        assert config["arguments"]["run"]["max_steps"] == 6
        assert config["deepspeed"]["train_micro_batch_size_per_gpu"] == 2
        assert "auto" not in json.dumps(config["deepspeed"])
        # A build suffix like +cpu may follow the version.
        assert torch.__version__.startswith(config["versions"]["torch"])

    def test_the_log_holds_steps_and_evaluations(self, two_processes):
        records = read_metrics(two_processes[0])
        assert [record["step"] for record in records if "loss" in record] == [2, 4, 6]
        evaluations = [record for record in records if "validation_loss" in record]
        assert [record["step"] for record in evaluations] == [0, 2, 4, 6]
        assert all("rouge1" in record for record in evaluations[1:])
        assert evaluations[-1]["validation_loss"] < 0.9 * evaluations[0]["validation_loss"]

    def test_samples_and_curves_are_there(self, two_processes):
        folder, _ = two_processes
        samples = (folder / "samples.md").read_text()
        assert all(f"Step {step}" in samples for step in (2, 4, 6))
        assert samples.count("validation-") >= 9
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_the_last_checkpoints_are_kept_with_a_part_of_each_process(self, two_processes):
        checkpoints = two_processes[0] / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
        for checkpoint in checkpoints.iterdir():
            assert (
                len(list(checkpoint.glob("process-*.pt"))) == len(list(checkpoint.glob("engine/*optim_states.pt"))) == 2
            )

    def test_the_model_loads_by_the_auto_classes_and_writes(self, two_processes):
        folder, _ = two_processes
        assert summarise(folder / "model")
        assert AutoTokenizer.from_pretrained(folder / "tokenizer")("ant")["input_ids"][0] == 0

    def test_another_number_of_processes_goes_on(self, two_processes, train_main, capsys, tmp_path):
        folder = shutil.copytree(two_processes[0], tmp_path / "run")
        assert train_main(["--resume", str(folder), "--max_steps", "8"]) == 0
        printed = capsys.readouterr().out
        assert "step-00000006, written with a different number of processes" in printed
        assert "2 per device x 1 accumulated x 1 processes" in printed
        # The folder is like other folders of checkpoints, without temporary files.
        assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "step-00000008"
        assert not list((folder / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Save a tiny BART with a tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained") / "bart"
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, 320)
    torch.manual_seed(3)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, max_position_embeddings=64, forced_eos_token_id=2, **sizes, **heads
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
def test_targets_and_generation_end_with_the_positions_of_the_decoder(
    documents, pretrained, tmp_path, train_main, capsys
):
    changes = {"model_name_or_path": pretrained, "max_target_length": 1200, "min_new_tokens": 64, "max_steps": 2}
    assert train_main(flags(documents, tmp_path / "run", **changes)) == 0
    printed = capsys.readouterr().out
    assert "warning: --max_target_length 1200: targets and generated texts end after 64 tokens" in printed
    assert "generation up to 64 tokens; greedy; " in printed
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "rouge1" in record] == [2]


@pytest.mark.slow
def test_settings_of_generation_are_told_held_against_the_targets_and_saved(
    documents, pretrained, tmp_path, train_main, capsys
):
    model = shutil.copytree(pretrained, tmp_path / "bart")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"min_length": 30, "length_penalty": 2.0}))
    changes = {"model_name_or_path": model, "max_target_length": 40, "max_steps": 2}
    assert train_main(flags(documents, tmp_path / "run", **changes)) == 0
    printed = capsys.readouterr().out
    assert "generation up to 40 tokens; greedy; min_length 30\n" in printed
    warning = r"warning: \d+ % of the targets cannot be generated with the model's setting min_length 30"
    assert re.search(f"{warning}; remove this limit with --min_new_tokens 0", printed)
    assert train_main(flags(documents, tmp_path / "changed", **changes, min_new_tokens=0)) == 0
    assert "cannot be generated" not in capsys.readouterr().out
    saved = json.loads((tmp_path / "changed" / "model" / "generation_config.json").read_text())
    assert saved["min_new_tokens"] == 0
    # without this setting, `generate` would stop at 20 tokens
    assert saved["max_new_tokens"] == 40
    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "changed" / "model").eval()
    trained.final_logits_bias[:, trained.config.eos_token_id] = -1e4
    assert trained.generate(torch.tensor([[0, 9, 2]])).shape[1] > 30
    # a model that is trained on goes by its new targets
    again = {"model_name_or_path": tmp_path / "changed" / "model", "max_target_length": 50, "max_steps": 2}
    assert train_main(flags(documents, tmp_path / "again", **again)) == 0
    assert "generation up to 50 tokens" in capsys.readouterr().out
    assert saved.get("min_length") is None


def test_a_model_whose_weights_are_cut_off_is_named_in_one_line(documents, pretrained, tmp_path, train_main, capsys):
    model = shutil.copytree(pretrained, tmp_path / "bart")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1])
    assert train_main(flags(documents, tmp_path / "run", model_name_or_path=model)) == 2
    assert_one_error(capsys.readouterr().err, f"--model_name_or_path {model}: the model cannot be read", "copy or")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_so_it_is_where_one_of_two_processes_cannot_read_them(documents, pretrained, tmp_path):
    def cannot_read():
        from recurrent_bart.training import experiment

        def refuse(*_):
            raise ValueError("--model_name_or_path bart: the model cannot be read")

        experiment.build_model = refuse

    arguments = flags(documents, tmp_path / "run", model_name_or_path=pretrained)
    ended = run_script(TRAIN, *arguments, environments=launched(2), firsts=[None, cannot_read], timeout=150)
    assert ended.codes == [2, 2], ended.text()
    assert_one_error(ended.text(), "error: process 1: --model_name_or_path bart: the model cannot be read")


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_hands_itself_to_torchrun_and_trains_a_pretrained_bart_on_sections(documents, pretrained, tmp_path):
    folder = tmp_path / "run"
    # The learning rate moves no weight by more than 1e-5, so the final weights reveal the initial weights.
    changes = {"model_name_or_path": pretrained, "task": "sections", "learning_rate": 1e-7, "weight_decay": 0}
    arguments = flags(documents, folder, deepspeed="ds_configs/zero2.json", max_steps=2, **changes)
    # the command hands itself to torchrun
    code, printed = run([sys.executable, COMMAND, "train", "--num_gpus", 2, *arguments], timeout=270)
    assert code == 0, printed
    steps = [record for record in read_metrics(folder) if "rank_seconds" in record]
    assert [len(step["rank_seconds"]) for step in steps] == [2, 2]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    found, expected = model.state_dict(), BartForConditionalGeneration.from_pretrained(pretrained).state_dict()
    assert expected.keys() < found.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-5) for name in expected)
    assert (model.config.pre_seq_len, model.config.decoder_context) == (3, "section")
    assert summarise(folder / "model")
    # Each section has a sample, named by its index in the document.
    assert "validation-0[0]" in (folder / "samples.md").read_text()


@pytest.mark.slow
def test_one_process_trains_on_sections(documents, tmp_path, train_main, capsys):
    folder = tmp_path / "run"
    assert train_main(flags(documents, folder, task="sections")) == 0
    printed = capsys.readouterr().out
    assert "x 1 processes" in printed
    assert "ZeRO-2" in printed
    losses = [record["validation_loss"] for record in read_metrics(folder) if "validation_loss" in record]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_every_configuration_gives_the_same_losses(documents, tmp_path, train_main):
    losses = {}
    for file in (ROOT / "ds_configs").glob("*.json"):
        folder = tmp_path / file.stem
        assert train_main(flags(documents, folder, deepspeed=file, max_steps=2)) == 0
        losses[file.name] = [record["loss"] for record in read_metrics(folder) if "loss" in record]
    assert len(losses) >= 3
    for name, found in losses.items():
        assert found == pytest.approx(losses["zero2.json"], rel=1e-4), name


@pytest.mark.slow
def test_bf16_trains(documents, tmp_path, train_main):
    folder = tmp_path / "run"
    assert train_main(flags(documents, folder, precision="bf16", log_every=2)) == 0
    losses = [record["validation_loss"] for record in read_metrics(folder) if "validation_loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    assert AutoModelForSeq2SeqLM.from_pretrained(folder / "model").dtype == torch.float32


BAD_FILES = {
    "empty": ("", "the file is empty"),
    "no column": ('{"id": 1, "text": "a b c"}\n', "no column 'document'"),
    "no target": ('{"document": "a b c", "summary": " "}\n', "the summary is empty"),
    "no text": ('{"document": "  ", "summary": "a"}\n', "the document is empty"),
    "unreadable line": ('{"document": "a b c", "summary": "a"}\n{"docum\n', "train.jsonl:2"),
}


@pytest.fixture
def bad_file(request, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(BAD_FILES[request.param][0])
    return file


def assert_nothing_is_left(tmp_path):
    assert not (tmp_path / "run").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("bad_file", BAD_FILES, indirect=True)
def test_bad_documents_end_in_one_line(request, documents, tmp_path, train_main, capsys, bad_file):
    changes = {"train_file": bad_file, "cache_dir": tmp_path / "cache"}
    assert train_main(flags(documents, tmp_path / "run", **changes)) == 2
    expected = BAD_FILES[request.node.callspec.params["bad_file"]][1]
    assert_one_error(capsys.readouterr().err, str(bad_file), expected)
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"segment_size": 5000}, "max_position_embeddings=1024"),
        ({"output_dir": "/proc/no/run"}, "--output_dir /proc/no/run: cannot be written"),
        ({"cache_dir": "/proc/no/cache"}, "/proc/no/cache"),
        ({"train_file": "/nowhere/train.jsonl"}, "/nowhere/train.jsonl"),
        (
            {"model_name_or_path": "/nowhere/bart"},
            "--model_name_or_path /nowhere/bart: no such folder; give the",
        ),
        (
            {"model_name_or_path": "runs/no/model"},
            "--model_name_or_path runs/no/model: no such folder; give the",
        ),
        ({"min_new_tokens": 9}, "--min_new_tokens 9: must be at most 8, the maximum length of a text"),
        ({"length_penalty": 2}, "--length_penalty has no effect without beam search"),
        ({"max_steps": 0}, "--max_steps 0: must be at least 1"),
        ({"max_setps": 3}, "--max_setps"),
        ({"deepspeed": "/nowhere/zero.json"}, "--deepspeed /nowhere/zero.json"),
        ({"resume": "/nowhere/run"}, "/nowhere/run"),
    ],
    ids=lambda item: "" if isinstance(item, str) else " ".join(item),
)
def test_bad_flags_end_in_one_line(documents, tmp_path, train_main, capsys, changes, expected):
    assert (
        train_main(flags(documents, **{"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"} | changes)) == 2
    )
    assert_one_error(capsys.readouterr().err, expected)
    assert not (tmp_path / "run").exists()


def test_a_process_with_bad_flags_lets_the_first_one_speak_before_its_launcher_ends_them_all(
    train_main, monkeypatch, capsys
):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert train_main(["--max_stepz", "4"]) == 2
    monkeypatch.setenv("RANK", "0")
    assert not "".join(capsys.readouterr())
    assert waited == [30]
    assert train_main(["--max_stepz", "4"]) == 2
    assert "unknown argument --max_stepz" in capsys.readouterr().err
    assert waited == [30]


@pytest.fixture
def bad_configuration(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_cliping": "auto"}')
    return file


@pytest.mark.distributed
@pytest.mark.slow
def test_an_unknown_deepspeed_key_ends_two_processes(documents, tmp_path, bad_configuration):
    arguments = flags(documents, tmp_path / "run", deepspeed=bad_configuration)
    ended = run_script(TRAIN, *arguments, environments=launched(2), timeout=150)
    assert ended.codes == [2, 2]
    assert_one_error(ended.text(), str(bad_configuration), "'gradient_cliping'", "did you mean 'gradient_clipping'")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("bad_file", ["unreadable line"], indirect=True)
def test_an_unreadable_line_ends_two_processes(documents, tmp_path, bad_file):
    changes = {"train_file": bad_file, "cache_dir": tmp_path / "cache"}
    ended = run_script(TRAIN, *flags(documents, tmp_path / "run", **changes), environments=launched(2), timeout=150)
    assert ended.codes == [2, 2], ended.text()
    assert_one_error(ended.text(), f"{bad_file}:2")
    assert_nothing_is_left(tmp_path)
