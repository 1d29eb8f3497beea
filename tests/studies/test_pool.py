"""The pool runs one process per place at a time, and each run ends independently of the rest."""

import math
import sys
import time

import pytest

from recurrent_bart.studies.pool import ENDED, Ended, run_side_by_side


def script(program):
    return lambda files, device: [sys.executable, "-c", program, device, *map(str, files)]


def files_in(folder, n):
    return [folder / f"{number}.json" for number in range(n)]


def alone(files):
    return [[file] for file in files]


def test_each_is_run_once_and_never_two_in_one_place(tmp_path):
    program = """
import sys, time, pathlib
device, file = sys.argv[1], pathlib.Path(sys.argv[2])
lock = file.parent / device
lock.mkdir()
time.sleep(0.1)
lock.rmdir()
file.write_text(device)
print(f"ended: {file}")
"""
    files = files_in(tmp_path, 5)
    ended = list(run_side_by_side(alone(files), ["a", "b"], script(program), math.inf))
    assert sorted(end.file for end in ended) == files
    assert [end.code for end in ended] == [0] * 5
    assert {file.read_text() for file in files} == {"a", "b"}


def test_one_that_fails_tells_why_and_others_go_on(tmp_path):
    program = """
import sys
print('said', flush=True)
sys.exit('wrong') if '1.json' in sys.argv[2] else print(f'ended: {sys.argv[2]}')
"""
    ended = list(run_side_by_side(alone(files_in(tmp_path, 3)), ["a"], script(program), math.inf))
    assert sorted((end.file.stem, end.code) for end in ended) == [("0", 0), ("1", 1), ("2", 0)]
    assert next(end.said for end in ended if end.code) == "said\nwrong"
    assert (tmp_path / "1.log").read_text() == "said\nwrong\n"


def test_of_a_process_with_several_runs_each_is_given_as_it_ends(tmp_path):
    first, second, third = files = files_in(tmp_path, 3)
    program = f"""
import sys, time
print("{ENDED}" + sys.argv[3], flush=True)
time.sleep(1.0)
print("{ENDED}" + sys.argv[2], flush=True)
print("{ENDED}" + "of somebody else", flush=True)
sys.exit(int(sys.argv[1]))
"""
    # exit code 0: the process did not begin the third run because its time was over; another code: it failed
    for code in (0, 3):
        times = []
        ended = []
        for end in run_side_by_side([files], [str(code)], script(program), math.inf):
            times.append(time.monotonic())
            ended.append(end)
        assert ended[:2] == [Ended(second, 0), Ended(first, 0)]
        assert times[1] - times[0] > 0.8
        assert (ended[2].file, ended[2].code) == (third, code or None)


def test_a_process_that_cannot_be_started_is_told(tmp_path):
    ended = run_side_by_side([files_in(tmp_path, 1)], ["a"], lambda *_: [str(tmp_path / "nothing")], math.inf)
    assert next(ended).code == 1
    with pytest.raises(FileNotFoundError):
        next(ended)


def test_none_is_started_when_the_time_is_over(tmp_path):
    program = "import sys, time; time.sleep(0.5); print('ended: ' + sys.argv[2])"
    started = time.time()
    ended = list(run_side_by_side(alone(files_in(tmp_path, 9)), ["a"], script(program), started + 1.0))
    assert time.time() - started < 4
    codes = [end.code for end in ended]
    assert codes.count(None) >= 6
    assert codes.count(0) >= 1
