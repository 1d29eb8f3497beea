"""launch/preflight.py on processes that stand for nodes."""

import pytest

from launching import TESTS, run, torchrun

PREFLIGHT = TESTS.parent / "launch" / "preflight.py"


def test_a_node_alone(tmp_path):
    code, printed = run(["python", PREFLIGHT, "--folder", tmp_path], timeout=100)
    assert code == 0, printed
    assert "all 1 nodes are fit" in printed
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_decides_the_exit_code(tmp_path):
    code, printed = run(
        ["python", PREFLIGHT, "--folder", tmp_path / "none", "--gpus", 99, "--min_memory", 1e9], timeout=100
    )
    assert code == 1, printed
    line = next(line for line in printed.splitlines() if line.startswith("bad node"))
    assert "GPUs, not 99" in line
    assert "none cannot be written (No such file or directory)" in line
    assert "GiB of memory free, expected 1e+09" in line


@pytest.mark.distributed
@pytest.mark.slow
def test_the_network_within_and_between_nodes_is_measured(tmp_path):
    code, printed = torchrun(4, PREFLIGHT, "--per_node", 2, "--folder", tmp_path, "--min_between", 1e6)
    assert code == 1, printed
    # both of one pair: the host has one name
    assert printed.count("GB/s on it") == 2
    assert "GB/s, expected 1e+06" in printed
