"""The wheel in an empty environment: every command comes with it, and only training needs DeepSpeed."""

import json
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import pytest

from launching import TESTS, environment, forks, load_script, run
from recurrent_bart_cli import COMMANDS, run_command, take_number
from runs import flags

ROOT = TESTS.parent
SOURCES = ("recurrent_bart", "ds_configs")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "recurrent_bart_cli.py")


def execute(program, *arguments, folder, **variables):
    """Run a program in `folder`, without this checkout on Python's path; return its output."""
    given = environment(**variables)
    given["PYTHONPATH"] = variables.get("PYTHONPATH", "")
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the programs of a new environment with the wheel; other packages come from the tests' environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source]
    subprocess.run(wheel, check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", *folder.glob("*.whl")]
    subprocess.run(install, check=True, capture_output=True)
    # a path file lends packages, but not the path files of the tests' environment, which name this checkout
    (own / "lent.pth").write_text("\n".join(site.getsitepackages()))
    return python.parent


def assert_serves(command, folder, **variables):
    """Start a service on a free port, ask for its health and for one summary, and stop it."""
    given = environment(**variables) | {"PYTHONPATH": variables["PYTHONPATH"], "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(list(map(str, command)), cwd=folder, env=given, **pipes)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}/health", timeout=60) as answer:
            assert json.load(answer) == {"status": "ok"}
        asked = urllib.request.Request(f"{address}/v1/summaries", b"ant bee cow", {"content-type": "text/plain"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["n_tokens"] > 0
    finally:
        server.send_signal(signal.SIGINT)
        _, printed = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_wheel_trains_evaluates_summarizes_and_serves_in_an_empty_environment(installed, documents, tmp_path):
    program = installed / "recurrent-bart"
    before = time.monotonic()
    assert "summarize" in execute(program, "--help", folder=tmp_path)
    assert time.monotonic() - before < 1
    place = execute(
        installed / "python", "-c", "import recurrent_bart; print(recurrent_bart.__file__)", folder=tmp_path
    )
    assert Path(place.strip()).is_relative_to(installed.parent)
    arguments = flags(documents, tmp_path / "run", max_steps=2, deepspeed="zero3")
    assert "model in" in execute(program, "train", *arguments, folder=tmp_path)
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "deepspeed.py").write_text("raise ModuleNotFoundError(name='deepspeed')")
    own = {"folder": tmp_path, "PYTHONPATH": str(absent)}
    assert "rouge1" in execute(program, "evaluate", "--model", "run/model", **own)
    (tmp_path / "text.txt").write_text("ant bee cow " * 30)
    assert execute(program, "summarize", "--model", "run/model", "--max_new_tokens", 4, "text.txt", **own)
    done = subprocess.run(
        [program, "train", "--max_steps", "1"],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(absent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    extra = "pip install 'recurrent-bart[train]'"
    assert (done.returncode, done.stderr) == (2, f"error: this command needs the package deepspeed: {extra}\n")
    assert_serves([program, "serve", "--model", "run/model", "--port", 0], **own)


def test_each_command_has_a_module_and_a_script():
    names = {name.replace("-", "_") for name in COMMANDS}
    assert all(callable(load_script(name).main) for name in names)
    assert {file.stem for file in (ROOT / "launch").glob("*.py")} == names


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "error: unknown command trian; the commands are train, "),
        (["train", "--num_gpus", "0"], "error: --num_gpus 0: must be a whole number, at least 1"),
        (["train", "--num-gpus=x"], "error: --num_gpus x: must be"),
        (["evaluate", "--num_gpus"], "error: --num_gpus : must be"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_imported(argv, message):
    code, output = run([sys.executable, "-X", "importtime", ROOT / "recurrent_bart_cli.py", *argv], timeout=20)
    assert code == 2
    assert message in output
    assert "torch" not in output


def test_the_number_of_processes_is_no_flag_of_the_command():
    assert take_number(["--seed", "1", "--num_gpus", "2", "--x"]) == ("2", ["--seed", "1", "--x"])
    assert take_number(["--num-gpus=4"]) == ("4", [])


@pytest.mark.parametrize("missing", ["deepspeed", "deepspeed.ops"])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch, capsys):
    def fail(name):
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr("recurrent_bart_cli.importlib.import_module", fail)
    assert run_command("train", ["--help"]) == 2
    assert capsys.readouterr().err == (
        "error: this command needs the package deepspeed: pip install 'recurrent-bart[train]'\n"
    )


def test_a_missing_package_that_no_extra_installs_is_raised(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr("recurrent_bart_cli.importlib.import_module", fail)
    with pytest.raises(ModuleNotFoundError):
        run_command("train", [])


@pytest.mark.slow
def test_a_command_of_training_names_the_extra_that_is_missing(tmp_path):
    """Run scripts in forks of a new process that has imported PyTorch and Transformers, which they need first."""
    (tmp_path / "deepspeed.py").write_text("raise ModuleNotFoundError(name='deepspeed')")
    commands = [({}, [f"launch/{name}.py", "--help"]) for name in ("train", "training_speed", "export")]
    command = forks(commands, ("datasets", "matplotlib.axes", "transformers.models.bart.modeling_bart"), "deepspeed", 2)
    code, output = run(command, timeout=100, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 0, output
    error = "error: this command needs the package deepspeed: pip install 'recurrent-bart[train]'"
    assert output.splitlines() == [error] * len(commands)
