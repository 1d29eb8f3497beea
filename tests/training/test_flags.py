"""Flags: no command accepts an abbreviation, and an unknown flag is answered with a suggestion."""

import ast
from pathlib import Path

import pytest

from launching import assert_one_error, load_script
from recurrent_bart.training.arguments import build_parser
from recurrent_bart.training.flags import HUGGING_FACE_FLAGS, NOTES, FlagParser

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    ("train", ["--max_setps", "3"], "unknown argument --max_setps; did you mean --max_steps"),
    ("train", ["--max_step", "3"], "unknown argument --max_step; did you mean --max_steps"),
    ("train", ["--out", "runs/a"], "unknown argument --out; did you mean --output_dir"),
    ("train", ["--num_epochs=3"], "unknown argument --num_epochs=3; use --num_train_epochs"),
    ("study", ["quick", "--num_train_epochs", "3"], "use --max_steps, which counts optimizer steps"),
    (
        "train",
        ["--resume_from_checkpoint", "a"],
        "use --resume, which takes the folder of the run",
    ),
    ("train", ["--overwrite_output_dir"], "use --output_dir and --resume, because a run is never overwritten"),
    ("train", ["--overwrite-output-dir"], "use --output_dir and --resume, because a run is never overwritten"),
    ("train", ["--report_to", "wandb"], "use --wandb_mode and --tensorboard"),
    ("evaluate", ["--model", "a", "--splitt", "test"], "unknown argument --splitt; did you mean --split"),
    ("evaluate", ["--modle", "a"], "unknown argument --modle; did you mean --model"),
    ("evaluate", ["--mod", "a"], "unknown argument --mod; did you mean --model"),
    ("evaluate", ["--model", "a", "--data", "b"], "unknown argument --data; did you mean --dataset"),
    ("evaluate", ["--model_name_or_path", "a"], "unknown argument --model_name_or_path; use --model"),
    ("evaluate", ["--model", "a", "--num_beams", "x"], "argument --num_beams/--num-beams: invalid int value: 'x'"),
    ("evaluate", ["--model", "a", "stray"], "unknown argument stray"),
    ("evaluate", [], "the following arguments are required: --model"),
    ("summarize", ["--modle", "a", "text.txt"], "unknown argument --modle; did you mean --model"),
    ("summarize", ["--model", "a", "--every", "text.txt"], "unknown argument --every; did you mean --every_segment"),
    ("summarize", ["--model", "a", "--max_length", "9"], "unknown argument --max_length; use --max_new_tokens"),
    ("summarize", ["text.txt"], "the following arguments are required: --model"),
    ("export", ["run", "model", "--trust"], "unknown argument --trust; did you mean --trust_remote_code"),
    ("report", ["run", "--outptu", "a"], "unknown argument --outptu; did you mean --output"),
    ("memory_map", ["--mod", "a", "text.txt"], "unknown argument --mod; did you mean --model"),
    ("study", ["quick", "--seed", "1"], "unknown argument --seed; did you mean --seeds"),
    ("benchmark", ["--suit", "quick"], "unknown argument --suit; did you mean --suite"),
    ("preflight", ["--gpu", "1"], "unknown argument --gpu; did you mean --gpus"),
    ("training_speed", ["--round", "1"], "unknown argument --round"),
]


@pytest.mark.parametrize(("name", "argv", "message"), SCRIPTS, ids=lambda item: " ".join(item) if item else "none")
def test_a_wrong_flag_is_one_line_with_the_right_one(name, argv, message, capsys):
    try:
        code = load_script(name).main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert_one_error(capsys.readouterr(), message)


def test_a_value_is_no_flag():
    parser = FlagParser("Test.")
    parser.add_argument("--text")
    parser.add_argument("files", nargs="*")
    assert parser.parse_flags(["--text", "-- a text", "--", "--file"]).files == ["--file"]


def test_every_flag_that_is_named_instead_is_there():
    known = set(build_parser()._option_string_actions)
    for name in ("evaluate", "summarize"):
        tree = ast.parse((ROOT / "recurrent_bart" / "commands" / f"{name}.py").read_text())
        fields = [node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        known |= {f"--{field}" for field in fields} | {text for text in texts if text.startswith("--")}
    assert {f"--{ours}" for flags in HUGGING_FACE_FLAGS.values() for ours in flags} <= known
    assert NOTES.keys() <= HUGGING_FACE_FLAGS.keys()


def test_no_parser_takes_abbreviations():
    for file in (ROOT / "recurrent_bart").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                assert any(item.arg == "allow_abbrev" for item in node.keywords), f"{file}:{node.lineno}"
