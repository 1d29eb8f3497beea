"""Tests that a run's files can be read again after any interruption."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from markdown_it import MarkdownIt

from recurrent_bart import run_folder as module
from recurrent_bart.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_the_configuration_holds_all_that_a_run_followed_from(folder):
    folder.write_config(arguments={"run": {"seed": 1}}, model={"d_model": 8}, deepspeed={"bf16": {}})
    config = json.loads(folder.config_file.read_text())
    assert config.keys() == {"arguments", "model", "deepspeed", "git_commit", "versions"}
    # a version may end with a build, for example +cpu
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert all(config["versions"].values())
    assert folder.read_config() == config
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("place", ["recurrent_bart", "deep/recurrent_bart", "venv/site-packages/recurrent_bart"])
def test_the_commit_is_that_of_the_code_and_never_of_a_repository_around_it(tmp_path, monkeypatch, place):
    package = tmp_path / place
    package.mkdir(parents=True)
    (package / "run_folder.py").write_text("old")
    (tmp_path / ".gitignore").write_text("venv\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "first")
    monkeypatch.setattr(module, "__file__", str(package / "run_folder.py"))
    is_checkout = place == "recurrent_bart"
    assert module.git_commit() == (git(tmp_path, "rev-parse", "HEAD") if is_checkout else None)
    (package / "run_folder.py").write_text("new")
    assert module.git_commit() == (git(tmp_path, "rev-parse", "HEAD") + "-dirty" if is_checkout else None)


def test_an_untracked_package_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / "recurrent_bart").mkdir()
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "--message", "first")
    (tmp_path / "recurrent_bart" / "run_folder.py").write_text("new")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "recurrent_bart" / "run_folder.py"))
    assert module.git_commit() is None


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(128, "git")])
def test_outside_a_checkout_there_is_no_commit(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module.subprocess, "run", fail)
    assert module.git_commit() is None


def test_metrics_are_one_json_object_a_line(folder):
    records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan"), "gradient_norm": float("inf")}]
    for record in records:
        folder.append_metrics(record)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == folder.read_metrics()
    assert folder.read_metrics() == [records[0], {"step": 2, "loss": None, "gradient_norm": None}]


def test_a_line_that_a_crash_cut_off_is_left_out_and_gone_after_resuming(folder):
    folder.append_metrics({"step": 1})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.read_metrics() == [{"step": 1}]
    folder.forget_after(1, 0)
    folder.append_metrics({"step": 2})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]


def test_what_was_logged_after_the_checkpoint_is_forgotten(folder):
    for step in range(0, 50, 10):
        folder.append_metrics({"step": step})
    folder.forget_after(20, 20)
    assert [record["step"] for record in folder.read_metrics()] == [0, 10, 20]


@pytest.mark.parametrize(("step", "evaluated_step", "evaluations"), [(20, 10, [0, 10]), (0, 0, [0]), (0, -1, [])])
def test_an_evaluation_that_is_made_again_is_forgotten(folder, step, evaluated_step, evaluations):
    for number in (0, 10, 20):
        folder.append_metrics({"step": number, "loss": 1.0})
        folder.append_metrics({"step": number, "validation_loss": 1.0})
    folder.forget_after(step, evaluated_step)
    records = folder.read_metrics()
    assert [record["step"] for record in records if "loss" in record] == list(range(0, step + 1, 10))
    assert [record["step"] for record in records if "validation_loss" in record] == evaluations


@pytest.mark.parametrize(
    ("step", "evaluated_step", "remaining"), [(25, 20, 3), (20, 10, 2), (10, 10, 2), (0, 0, 1), (0, -1, 0)]
)
def test_samples_of_an_evaluation_that_is_made_again_are_forgotten(folder, step, evaluated_step, remaining):
    sample = SimpleNamespace(id="m", source="## Step 30", target="t", generated="g")
    texts = [""]
    for number in (0, 10, 20, 30, 100):
        folder.append_samples(f"Step {number}", [sample])
        texts.append(folder.samples_file.read_text())
    folder.forget_after(step, evaluated_step)
    assert folder.samples_file.read_text() == texts[remaining]


def test_without_a_log_there_is_nothing_to_forget(folder):
    assert folder.read_metrics() == []
    folder.forget_after(0, 0)
    assert folder.read_metrics() == []


def read_markdown(text):
    """Return headings and code blocks as a renderer shows them; check that all other lines are plain text."""
    for token in MarkdownIt().parse(text):
        if token.type == "code_block":
            yield " ".join(token.content.split())
        elif token.type == "inline":
            assert all(child.type in ("text", "code_inline") for child in token.children)
            yield " ".join(child.content for child in token.children)


def test_samples_are_shown_as_they_are(folder):
    texts = [
        "def __init__(self): | x *= 2",
        "about <dig> of `a` [b] \\ 東京 &amp; ```",
        "two\n lines\n\n## and  spaces",
    ]
    sample = SimpleNamespace(id="m.__main__[0]`", source=texts[0], target=texts[1], generated=texts[2])
    folder.append_samples("Step 10", [sample])
    folder.append_samples("Step 20", [sample, sample])
    shown = ["source", texts[0], "target", texts[1], "generated", "two lines ## and spaces"]
    expected = [sample.id, *shown]
    text = folder.samples_file.read_text(encoding="utf-8")
    assert list(read_markdown(text)) == ["Step 10", *expected, "Step 20", *expected, *expected]
    # the file contains the texts without escape characters
    assert all(piece in text for piece in (*texts[:2], sample.id))


def test_long_samples_are_shortened_and_fit_on_a_screen(folder):
    sample = SimpleNamespace(id="m", source="a", target=" ".join(["word"] * 3600), generated="b" * 1200)
    folder.append_samples("Step 10", [sample])
    lines = folder.samples_file.read_text().splitlines()
    assert sum(map(len, lines)) < 3000
    assert all(len(line) <= 104 for line in lines if "b" not in line)
    (found,) = folder.read_samples()
    head = sample.target[:1200]
    assert found["target"] == f"{head.strip()} [... 16,799 more characters]"
    assert found["generated"] == sample.generated


def test_samples_can_be_read_back(folder):
    texts = {"source": "def __init__(self): | x *= 2", "target": "about <dig> of `a` [b] \\ 東京", "generated": ""}
    # texts that look like the file's own markup
    texts["source"] += " ## Step 10 ### ` m ` " + "target source generated " * 20 + "well-known " * 20
    assert folder.read_samples() == []
    for step in (10, 20):
        folder.append_samples(f"Step {step}", [SimpleNamespace(id="m.__main__[0]", **texts)])
    expected = [{"step": step, "id": "m.__main__[0]", **texts} for step in (10, 20)]
    expected = [{**sample, "source": sample["source"].strip()} for sample in expected]
    assert folder.read_samples() == expected
    # truncated within the last text
    folder.samples_file.write_text(folder.samples_file.read_text(encoding="utf-8")[:-1], encoding="utf-8")
    del expected[1]["generated"]
    assert folder.read_samples() == expected


def test_a_folder_with_a_run_is_refused(folder):
    folder.check_new()
    folder.write_config()
    with pytest.raises(ValueError, match=r"already holds a run: continue it with --resume"):
        folder.check_new()


def test_checking_leaves_nothing_behind(tmp_path):
    RunFolder(tmp_path / "a" / "b").check_new()
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir .*: .*file is not a folder"):
        RunFolder(tmp_path / "file" / "run").check_new()


def test_a_place_that_cannot_be_written_is_refused():
    """Use a folder in which not even root can create files."""
    with pytest.raises(
        ValueError, match=r"--output_dir /proc/self/run: (cannot be written|the folder cannot be created)"
    ):
        RunFolder(module.Path("/proc/self/run")).check_new()


def test_a_place_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="the folder cannot be created"):
        RunFolder(tmp_path / "run").create()


@pytest.mark.parametrize("content", [None, "{", b"\xff\xfe"])
def test_what_is_no_run_cannot_be_resumed(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"--resume .*: .*/config.json is missing or unreadable"):
        RunFolder(tmp_path).read_config()
