"""Tests that the table of faults in launch/README.md has the correct exit codes and meanings."""

import re

import launching
from recurrent_bart.training.arguments import build_parser
from recurrent_bart.training.lifecycle.exit_codes import ExitCode

PAGE = (launching.TESTS.parent / "launch" / "README.md").read_text()
SECTION = PAGE.split("## What happens when")[1].split("\n#")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("|")]


def test_every_exit_code_is_explained_by_its_name():
    told = {int(code): name for code, name in re.findall(r"`(\d+)` \(([A-Z]+)\)", SECTION)}
    assert told == {code.value: code.name for code in ExitCode}


def test_the_table_has_no_other_exit_code():
    codes = [cell for *_, cell in ROWS[2:]]
    assert len(codes) >= 15
    assert {int(code) for cell in codes for code in re.findall(r"\d+", cell)} == {code.value for code in ExitCode}


def test_all_flags_in_the_table_exist():
    flags = set(re.findall(r"--[a-z_]+", SECTION))
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert flags
    assert flags <= known
