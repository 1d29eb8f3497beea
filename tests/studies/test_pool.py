"""Runs side by side: as many as there are places, each on its own, whatever becomes of the others."""

import math
import sys
import time

from recurrent_bart.studies.pool import run_side_by_side


def script(program):
    return lambda file, device, seconds: [sys.executable, "-c", program, str(file), device, str(seconds)]


def files_in(folder, n):
    return [folder / f"{number}.json" for number in range(n)]


def test_each_is_run_once_and_never_two_in_one_place(tmp_path):
    program = """
import sys, time, pathlib
file, device = pathlib.Path(sys.argv[1]), sys.argv[2]
lock = file.parent / device
lock.mkdir()
time.sleep(0.1)
lock.rmdir()
file.write_text(device)
"""
    files = files_in(tmp_path, 5)
    ended = list(run_side_by_side(files, ["a", "b"], script(program), math.inf))
    assert sorted(end.file for end in ended) == files
    assert [end.code for end in ended] == [0] * 5
    assert {file.read_text() for file in files} == {"a", "b"}


def test_one_that_fails_tells_why_and_others_go_on(tmp_path):
    program = "import sys; print('said', flush=True); sys.exit('wrong' if '1.json' in sys.argv[1] else 0)"
    ended = list(run_side_by_side(files_in(tmp_path, 3), ["a"], script(program), math.inf))
    assert sorted((end.file.stem, end.code) for end in ended) == [("0", 0), ("1", 1), ("2", 0)]
    assert next(end.said for end in ended if end.code) == "said\nwrong"
    assert (tmp_path / "1.log").read_text() == "said\nwrong\n"


def test_none_is_started_when_the_time_is_over_and_each_is_told_what_is_left(tmp_path):
    program = "import sys, time; time.sleep(0.5); print(sys.argv[3])"
    started = time.monotonic()
    ended = list(run_side_by_side(files_in(tmp_path, 9), ["a"], script(program), budget_seconds=1.0))
    assert time.monotonic() - started < 4
    codes = [end.code for end in ended]
    assert codes.count(None) >= 6
    left = [float(end.said) for end in ended if end.code == 0]
    assert all(0 < seconds <= 1.0 for seconds in left)
    assert left == sorted(left, reverse=True)
