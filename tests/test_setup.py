"""Tests of the setup: one command, run once, at exact versions that cover all imports."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAKEFILE_READS = ("Makefile", "setup.py", "constraints.txt")
# a program that logs its call; `python3 -m venv FOLDER` creates further ones in FOLDER/bin
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> {log}
if [ "$2" = venv ]; then
  mkdir -p "$3/bin"
  for program in pip pytest deepspeed; do cp "$0" "$3/bin/$program"; done
fi
test ! -e {log}.fails-"$(basename "$0")"
"""


def required(extra=None):
    """Return the requirements in setup.py, of the package or of an extra."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    setup = next(call for call in calls if getattr(call.func, "id", None) == "setup")
    given = {item.arg: item.value for item in setup.keywords}
    lines = ast.literal_eval(given["extras_require"])[extra] if extra else ast.literal_eval(given["install_requires"])
    return [Requirement(line) for line in lines]


OWN = {"recurrent_bart", "recurrent_bart_cli"}
EXTRAS = [
    requirement for extra in ("train", "lora", "tensorboard", "japanese", "serve") for requirement in required(extra)
]


def constraints():
    """Return exact versions by package."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    return dict(line.split("==") for line in lines)


@pytest.fixture
def checkout(tmp_path):
    """Create a folder with the Makefile and its dependencies, and programs that log their calls in `log`."""
    for name in MAKEFILE_READS:
        shutil.copy(ROOT / name, tmp_path)
    program = tmp_path / "python3"
    program.write_text(PROGRAM.format(log=tmp_path / "log"))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def make(checkout, goal):
    """Run a goal; return the exit code and the calls of programs, by name and arguments."""
    return make_and_listen(checkout, goal)[:2]


def make_and_listen(checkout, goal):
    """Run a goal; return the results of `make` and the printed lines."""
    log = checkout / "log"
    log.write_text("")
    command = ["make", "--no-print-directory", goal, f"PYTHON={checkout / 'python3'}"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)
    return done.returncode, log.read_text().splitlines(), done.stdout.splitlines()


def test_a_goal_sets_up_once_and_does_its_job(checkout):
    code, calls = make(checkout, "test")
    assert code == 0
    assert [call.split()[0] for call in calls] == ["python3", "python3", "pip", "pytest"]
    assert calls[2].startswith("pip install ")
    assert "--constraint constraints.txt --editable .[dev]" in calls[2]
    assert make(checkout, "test") == (0, calls[3:])
    assert make(checkout, "train") == (0, ["deepspeed --quiet launch/train.py --deepspeed ds_configs/zero3.json"])


def test_the_short_run_leaves_out_slow_tests_and_those_of_several_processes(checkout):
    (*_, short), (*_, whole) = make(checkout, "test")[1], make(checkout, "test-all")[1]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (left_out,) = re.findall("-m '(.+)'", settings)
    # cases outside the selection of test-all are slow
    chosen = left_out.removesuffix(" and not rare")
    assert chosen != left_out
    assert short == f"{whole} -m {chosen} and not slow and not distributed"


def test_every_case_that_test_all_leaves_out_can_be_run(checkout):
    (*_, rare), (*_, whole) = make(checkout, "test-every-case")[1], make(checkout, "test-all")[1]
    assert rare == f"{whole} -m rare and not gpu"


def test_a_set_up_of_minutes_is_not_silent(checkout):
    _, calls, printed = make_and_listen(checkout, "test")
    (announced,) = [number for number, line in enumerate(printed) if line.startswith("installing ")]
    # the line is printed before pip starts and prints
    assert "pip install" in printed[announced + 1]
    (install,) = [call for call in calls if call.startswith("pip install")]
    assert not {"--quiet", "-q", "-qq"} & set(install.split())
    assert not any(line.startswith("installing ") for line in make_and_listen(checkout, "test")[2])


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_other_requirements_are_installed_anew(name, checkout):
    make(checkout, "test")
    stamp = checkout / ".venv" / "installed"
    os.utime(checkout / name, (stamp.stat().st_atime, stamp.stat().st_mtime + 10))
    calls = make(checkout, "test")[1]
    assert [call.split()[0] for call in calls] == ["python3", "pip", "pytest"]


def test_a_set_up_that_failed_is_taken_up_again(checkout):
    broken = checkout / "log.fails-pip"
    broken.touch()
    code, calls = make(checkout, "test")
    assert code != 0
    assert "pytest" not in [call.split()[0] for call in calls]
    broken.unlink()
    code, calls = make(checkout, "test")
    assert code == 0
    assert [call.split()[0] for call in calls] == ["python3", "pip", "pytest"]


def test_an_old_python_is_refused(checkout):
    (checkout / "log.fails-python3").touch()
    code, calls = make(checkout, "test")
    assert code != 0
    assert len(calls) == 1
    condition = re.search(r'-c "(.+)"', (ROOT / "Makefile").read_text())[1]
    assert subprocess.run([sys.executable, "-c", condition]).returncode == 0
    older = condition.replace("sys.version_info", "(3, 10)")
    assert (
        "Python 3.11 or later" in subprocess.run([sys.executable, "-c", older], capture_output=True, text=True).stderr
    )


def test_what_must_pass_is_the_check_and_the_tests(tmp_path):
    program = tmp_path / "make"
    program.write_text(PROGRAM.format(log=tmp_path / "log"))
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment).returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        f"make {goal}" for goal in ("check", "test-all", "test-slurm", "test-browser")
    ]
    (tmp_path / "log.fails-make").touch()
    assert subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment).returncode != 0


def test_exact_versions_cover_all_requirements_and_lie_in_their_ranges():
    exact = constraints()
    assert exact["torch"] == "2.13.0"
    for requirement in [*required(), *EXTRAS, *required("dev")]:
        assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)]), requirement


def test_the_setup_of_developers_has_all_extras():
    assert {str(requirement) for requirement in EXTRAS} <= {str(requirement) for requirement in required("dev")}


def test_using_a_model_needs_no_package_of_training():
    needed = {requirement.name for requirement in required()}
    assert not needed & {requirement.name for requirement in required("train")}


def test_ranges_admit_what_a_gpu_machine_may_have():
    ranges = {requirement.name: requirement.specifier for requirement in required()}
    assert ranges["torch"].contains("2.11.0")
    assert ranges["transformers"].contains("5.17.0")


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.10.0"), ("transformers", "5.16.9"), ("deepspeed", "0.19.7"), ("regex", "2025.9.1")],
)
def test_ranges_refuse_what_is_too_old(name, version):
    (found,) = [requirement for requirement in [*required(), *EXTRAS] if requirement.name == name]
    assert not found.specifier.contains(version)


def test_the_pages_name_the_oldest_versions():
    (torch,) = [requirement for requirement in required() if requirement.name == "torch"]
    readme = (ROOT / "README.md").read_text()
    assert f">={re.search(r'build of PyTorch .([0-9.]+) or later', readme)[1]}" in str(torch.specifier).split(",")
    oldest = re.search(r'python_requires="(.+)"', (ROOT / "setup.py").read_text())[1]
    assert oldest == f">={re.search(r'Python ([0-9.]+) or later', readme)[1]}"


def test_every_library_has_an_upper_bound_below_its_next_major_version():
    exact = constraints()
    for requirement in [*required(), *EXTRAS]:
        # the versions of this dictionary are dates
        if requirement.name == "sudachidict_core":
            continue
        major = int(exact[canonicalize_name(requirement.name)].split(".")[0])
        assert not requirement.specifier.contains(f"{major + 1}.0"), requirement


@pytest.mark.slow
def test_all_that_is_imported_is_required():
    given = [*required(), *EXTRAS]
    direct = {canonicalize_name(requirement.name) for requirement in given}
    # dependencies of the requirements are installed too
    theirs = [Requirement(line) for name in direct for line in requires(name) or [] if "extra ==" not in line]
    # torch for CPU does not depend on triton, and its kernels are not imported there
    known = direct | {canonicalize_name(requirement.name) for requirement in theirs} | {"triton"}
    distributions = packages_distributions()
    for file in [*(ROOT / "recurrent_bart").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - OWN:
                assert {canonicalize_name(d) for d in distributions[name]} & known, f"{file}: {name}"
