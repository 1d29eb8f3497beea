"""Tests of the repository's layout: direction of imports, side effects, and where environment and flags are read."""

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from launching import run

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recurrent_bart"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROGRAM = ROOT / "recurrent_bart_cli.py"
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
ENVIRONMENT = PACKAGE / "training" / "environment.py"
# each layer imports only earlier layers and itself
LAYERS = [
    {"configuration_recurrent_bart", "distributed", "files"},
    {"run_folder"},
    {"recurrence"},
    {"execution"},
    {"model"},
    {"data", "monitoring"},
    {"evaluation", "inference", "report"},
    {"checkpointing", "probes"},
    {"training"},
    {"studies", "benchmarks", "cluster", "serving"},
    {"commands"},
    {"launch"},
]
FOLDERS = {"ds_configs", "launch", "recurrent_bart", "tests", "slurm"}
SETTINGS = {"recurrent_bart_cli.py", "setup.py", "pyproject.toml", "constraints.txt", "Makefile"}
PAGES = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RESULTS.md", "LICENSE"}


def kind_of(module):
    """Return the folder, or the module beside the folders, that a dotted name belongs to."""
    parts = module.split(".")
    return "launch" if parts[0] == "launch" or len(parts) == 1 else parts[1]


def level_of(kind):
    return next(number for number, kinds in enumerate(LAYERS) if kind in kinds)


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def syntax_of(file):
    return list(ast.walk(ast.parse(file.read_text())))


def imports_of(file):
    """Return the dotted names of everything that a file imports, also within functions."""
    for node in syntax_of(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module


def uses_of(file, *names):
    """Return the attributes and names in a file that are among `names`."""
    found = {node.attr for node in syntax_of(file) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in syntax_of(file) if isinstance(node, ast.Name)}
    found |= {alias.name for node in syntax_of(file) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return found & set(names)


@pytest.mark.parametrize("file", MODULES + SCRIPTS, ids=name_of)
def test_imports_point_one_way(file):
    here = name_of(file)
    if here == "recurrent_bart":
        allowed = {"configuration_recurrent_bart", "recurrence", "model", "inference"}
    else:
        lower = LAYERS[: level_of(kind_of(here))]
        allowed = {kind for kinds in lower for kind in kinds} | ({kind_of(here)} - {"launch"})
    wrong = {m for m in imports_of(file) if m.startswith(("recurrent_bart.", "launch")) and kind_of(m) not in allowed}
    assert not wrong


@pytest.mark.slow
def test_every_import_of_the_package_names_a_module_that_layers_can_see():
    # `import recurrent_bart` or `from recurrent_bart import x` would hide the imported module
    for file in MODULES + SCRIPTS:
        assert "recurrent_bart" not in set(imports_of(file)), file


def test_only_checkpointing_and_training_know_deepspeed():
    users = {file for file in MODULES + SCRIPTS if any(m.split(".")[0] == "deepspeed" for m in imports_of(file))}
    assert users
    assert {kind_of(name_of(file)) for file in users} <= {"checkpointing", "training"}


@pytest.mark.slow
def test_the_command_line_is_read_in_launch_alone():
    assert all(uses_of(file, "argv") == {"argv"} for file in [PROGRAM, *SCRIPTS])
    for file in MODULES:
        read = [n for n in syntax_of(file) if isinstance(n, ast.Attribute) and n.attr in {"argv", "orig_argv"}]
        assert not read, file
        assert "argv" not in {a.name for n in syntax_of(file) if isinstance(n, ast.ImportFrom) for a in n.names}, file


@pytest.mark.slow
def test_parsers_are_given_their_command_line():
    # without an argument, argparse reads sys.argv
    for file in MODULES + SCRIPTS:
        for node in syntax_of(file):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_parse = node.func.attr.startswith(("parse_args", "parse_known_args", "parse_flags"))
                assert not is_parse or node.args, f"{file}:{node.lineno}"


@pytest.mark.slow
def test_environment_variables_are_read_in_one_module():
    names = ("environ", "environb", "getenv", "putenv", "unsetenv")
    users = [file for file in MODULES + SCRIPTS if uses_of(file, *names)]
    assert users == [ENVIRONMENT]


@pytest.mark.slow
def test_training_steps_copy_to_a_gpu_through_pinned_memory():
    # `to_device` pins; torch.tensor(..., device=...) would wait for the GPU
    folders = {"recurrence", "execution", "model"}
    files = [file for file in MODULES if kind_of(name_of(file)) in folders and "decoding" not in file.parts]
    for file in files:
        for node in syntax_of(file):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_copy = node.func.attr in {"tensor", "as_tensor"} and any(it.arg == "device" for it in node.keywords)
                assert not is_copy, f"{file}:{node.lineno}"
    assert [file.name for file in files if uses_of(file, "pin_memory")] == ["segmentation.py"]


def test_no_script_hides_a_module():
    # Python puts a script's folder first on the path
    path = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT / "launch", ROOT / "tests")]
    for file in SCRIPTS:
        assert file.stem not in sys.builtin_module_names
        assert importlib.machinery.PathFinder.find_spec(file.stem, path) is None, file


@pytest.mark.slow
def test_importing_has_no_side_effect():
    # kernels can be imported only with triton
    has_triton = importlib.util.find_spec("triton") is not None
    ours = [name_of(file) for file in MODULES if has_triton or "kernels" not in file.parts]
    # import other packages first, because their side effects do not count
    others = sorted({name for file in MODULES for name in imports_of(file) if not name.startswith("recurrent_bart")})
    others = [name for name in others if has_triton or not name.startswith("triton")]
    program = f"""
import importlib, os, random, sys
import torch
for name in {others}:
    importlib.import_module(name)
def everything():
    generators = torch.get_rng_state().tolist(), random.getstate()
    return dict(os.environ), generators, torch.get_default_dtype(), torch.get_num_threads(), sys.path[:], os.getcwd()
before = everything()
for name in {ours}:
    importlib.import_module(name)
assert everything() == before
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert "recurrent_bart.training.trainer" in sys.modules
"""
    code, output = run([sys.executable, "-c", program], timeout=100)
    assert code == 0, output


@pytest.mark.slow
def test_every_script_can_be_the_first_to_import_the_package():
    # in most tests the process has already imported the package
    program = f"""
import os, runpy
import datasets, deepspeed.comm, matplotlib.figure, transformers.models.bart.modeling_bart
for script in {list(map(str, SCRIPTS))}:
    process = os.fork()
    if not process:
        runpy.run_path(script)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0, script
"""
    code, output = run([sys.executable, "-c", program], timeout=100)
    assert code == 0, output


def test_each_script_only_calls_its_command():
    for file in SCRIPTS:
        assert set(imports_of(file)) == {"sys", "recurrent_bart_cli"}
        assert f'run_command("{file.stem}", sys.argv[1:])' in file.read_text(encoding="utf-8")
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in syntax_of(file)), file


def test_no_file_is_a_drawer_for_everything():
    names = {file.stem for file in [*MODULES, *SCRIPTS, *(ROOT / "tests").rglob("*.py")]}
    assert not names & {"utils", "helpers", "misc", "common"}


def test_no_except_catches_all_in_silence():
    for file in MODULES + SCRIPTS:
        bare = [node.lineno for node in syntax_of(file) if isinstance(node, ast.ExceptHandler) and node.type is None]
        assert not bare, file


def test_the_top_level_holds_what_the_house_map_names():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in there if not name.startswith(".")} <= FOLDERS | SETTINGS | PAGES
    assert {"recurrent_bart", "launch", "tests", "ds_configs"} <= there
