"""Tests that the README's commands and Python code run, and that its tree matches the repository."""

import functools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from forked import run_script
from launching import TESTS, run
from recurrent_bart.data import sources, stdlib
from recurrent_bart.data.tokenizer import train_tokenizer
from runs import WORDS, write_documents

ROOT = TESTS.parent
README = (ROOT / "README.md").read_text()
# flags that make a run short; appended, they override the README's
SHORT = {
    "max_steps": 2,
    "warmup_steps": 1,
    "eval_documents": 2,
    "max_target_length": 8,
    "segment_size": 128,
    "pre_seq_len": 3,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0,
    "timeout_minutes": 2,
    "vocab_size": 500,
    "max_n_segments": 3,
    "wandb_mode": "disabled",
}
# a command without a launcher, and its standard input file if any
PYTHON = re.compile(r"(?:cat (?P<stdin>\S+) \| )?python (?P<command>launch/.+)")
# command for the user's shell only
NOT_RUN = {"source .venv/bin/activate"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(block, program):
    lines = [line for line in block.splitlines() if line not in NOT_RUN]
    return [line for line in lines if line.startswith("make") == (program == "make")]


def chains():
    """Return lists of commands that run in order: per block, or per run that several blocks continue."""
    found = {}
    for block in blocks("bash"):
        lines = commands(block, "launch")
        if lines:
            found.setdefault("papers" if "runs/papers" in block else lines[0], []).extend(lines)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Create a folder with the programs, documents, texts and pretrained BART that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("launch", "ds_configs", "recurrent_bart"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "library").mkdir()
    for module in stdlib.library_root().glob("c*.py"):
        shutil.copy(module, folder / "library")
    (folder / "papers").mkdir()
    write_documents(folder / "papers")
    text = " ".join(WORDS * 8)
    for name in ("paper.txt", "minutes.txt", "more.txt"):
        (folder / name).write_text(text)
    tokenizer = train_tokenizer([text] * 5, vocab_size=300)
    tokenizer.save_pretrained(folder / "facebook" / "bart-base")
    layers = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **layers)
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder / "facebook" / "bart-base")
    return folder


def shortened(line, folder):
    if "launch/train.py" in line:
        flags = {**SHORT, "cache_dir": folder / "cache"}
        if "--resume" in line:
            flags = {"max_steps": 4}
        if not PYTHON.fullmatch(line):
            # the whole library takes a minute
            flags |= {"dataset": "papers"}
        line += "".join(f" --{name} {value}" for name, value in flags.items())
    if "launch/benchmark.py" in line:
        line += " --segment_size 16 --rounds 1 --passes 1"
    if "launch/study.py" in line:
        line += " --max_steps 2 --seeds 1"
    if "launch/training_speed.py" in line:
        # it would start one or two processes eight times; tests/launch/test_training_speed.py has one start
        line += " --budget_seconds 0"
    if "study.py sections" in line:
        # each model starts a process that imports everything
        line += " --only layerwise-seed0 --set model_size=tiny segment_size=64 max_n_segments=3 max_target_length=8"
    return line


def run_line(line, folder):
    """Run a command of the README in `folder`; return its exit code and output."""
    found = PYTHON.fullmatch(line)
    if not found:
        script = f"cd {shlex.quote(str(folder))} && set -o pipefail && {line}"
        return run(["bash", "-c", script], timeout=400, HOME=str(folder))
    stdin = folder / found["stdin"] if found["stdin"] else ""
    first = functools.partial(use_library, folder / "library")
    command = shlex.split(found["command"])
    ended = run_script(*command, environments=[{"HOME": folder}], firsts=[first], folder=folder, stdin=stdin)
    return ended.codes[0], ended.text()


def use_library(folder):
    """Replace Python's standard library by a part of it."""
    stdlib.library_root = sources.library_root = lambda: folder


# takes one or two minutes; the limit allows for busy machines
@pytest.mark.timeout(900)
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("chain", chains())
def test_every_command_runs_in_its_order(place, chain):
    for line in chains()[chain]:
        code, output = run_line(shortened(line, place), place)
        assert code == 0, f"{line}\n{output}"
    if chain == "papers":
        assert (place / "runs" / "papers" / "model" / "config.json").exists()
        assert (place / "minutes.state").exists()


def test_commands_are_found_in_their_chains():
    assert len(chains()) >= 4
    assert len(chains()["papers"]) >= 9
    lines = [line for chain in chains().values() for line in chain]
    assert all(PYTHON.fullmatch(line) for line in lines if not line.startswith(("deepspeed", "torchrun")))


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in commands(block, "make")])
def test_every_goal_is_in_the_makefile(line):
    subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("block", blocks("python"))
def test_every_line_of_python_runs(place, block, monkeypatch):
    monkeypatch.chdir(place)
    exec(compile(block, "README.md", "exec"), {})


def test_the_tree_has_a_line_for_each_file_there_is():
    """Compare with git's files, without the tests, which mirror the package."""
    tree = README.split("## The tree")[1].split("\n## ")[0]
    told = re.findall(r"^(\S+)\s{2,}\S", tree, flags=re.MULTILINE)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [name for name in listed if not name.startswith((".", "tests/")) and Path(name).name != "__init__.py"]
    assert sorted(told) == sorted({*files, "tests/", ".ci/run"} - {"recurrent_bart/py.typed"})
