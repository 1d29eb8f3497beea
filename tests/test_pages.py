"""Tests that the pages' commands and Python code run, that their links resolve, and that the tree is complete."""

import contextlib
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
from runs import WORDS, write_documents, write_run_with_model

ROOT = TESTS.parent
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
README = ROOT / "README.md"
# the root's page is first, because commands of other pages continue its runs
JAPANESE = ROOT / "launch" / "JAPANESE.md"
PAGES = [README, *(ROOT / name for name in LISTED if name.endswith("/README.md")), JAPANESE]
MARKDOWN = [ROOT / name for name in LISTED if name.endswith(".md")]
# flags that make a run short; appended, they override the pages'
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


def blocks(language, pages=PAGES):
    pages = (page.read_text() for page in pages)
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)]


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
    """Create a folder with the programs, documents, texts and pretrained BART that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
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
    write_run_with_model(folder / "runs" / "mine", [text], {"data": {"max_target_length": 6}})
    with contextlib.chdir(folder):
        # the page's own documents and model, for its commands
        for block in blocks("python", [JAPANESE]):
            exec(compile(block, "a page", "exec"), {})
    return folder


def shortened(line, folder):
    if "launch/train.py" in line:
        flags = {**SHORT, "cache_dir": folder / "cache"}
        if "--resume" in line:
            flags = {"num_train_epochs": 0.3}
        if not PYTHON.fullmatch(line):
            # the whole library takes a minute
            flags |= {"dataset": "papers"}
        line += "".join(f" --{name} {value}" for name, value in flags.items())
    if "launch/benchmark.py" in line:
        line += " --segment_size 16 --rounds 1 --passes 1"
        if "--suite generation" in line:
            # the last value of a flag counts
            line += " --model_size tiny --new_tokens 4 --batch_sizes 1 --contexts 64"
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
    """Run a command of a page in `folder`; return its exit code and output."""
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
    exec(compile(block, "a page", "exec"), {})


def prose_of(page):
    """Return the text of a page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors_of(page):
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page):
    """Return the targets of the links to files and headings."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    return [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_links_to_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(README)}
    assert set(PAGES[1:]) <= linked
    assert len(PAGES) >= 8


def test_the_tree_has_a_line_for_each_folder_there_is():
    tree = README.read_text().split("## The tree")[1].split("\n## ")[0]
    lines = re.findall(r"^(\S+)/\s{2,}\S", tree, flags=re.MULTILINE)
    parents = [Path(name).parent.parts for name in LISTED]
    folders = {parts[:1] for parts in parents if parts}
    folders |= {parts[:2] for parts in parents if parts[:1] == ("recurrent_bart",)}
    assert sorted(lines) == sorted("/".join(parts) for parts in folders)


def test_the_readme_has_at_most_220_lines():
    assert len(README.read_text().splitlines()) <= 220
