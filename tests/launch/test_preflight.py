"""`launch/preflight.py` on local processes that stand for nodes."""

import pytest

from forked import launched, run_script

PREFLIGHT = "launch/preflight.py"
# even a single node runs in a new process, which ends without cleanup
pytestmark = pytest.mark.distributed


def test_a_node_alone(tmp_path):
    # limits that a test machine with little room passes
    ended = run_script(PREFLIGHT, "--folder", tmp_path, "--min_disk", 0.01, "--min_memory", 0.01, timeout=100)
    assert ended.codes == [0], ended.text()
    assert "all 1 nodes passed" in ended.text()
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_decides_the_exit_code(tmp_path):
    ended = run_script(PREFLIGHT, "--folder", tmp_path / "none", "--gpus", 99, "--min_memory", 1e9, timeout=100)
    assert ended.codes == [1], ended.text()
    line = next(line for line in ended.text().splitlines() if line.startswith("bad node"))
    assert "GPUs found, 99 required" in line
    assert "none cannot be written (No such file or directory)" in line
    assert "GiB of memory free, at least 1e+09 required" in line


@pytest.mark.slow
def test_the_network_within_and_between_nodes_is_measured(tmp_path):
    flags = ["--per_node", 2, "--folder", tmp_path, "--min_between", 1e6]
    ended = run_script(PREFLIGHT, *flags, environments=launched(4))
    # Rank 0 prints the result.
    assert ended.codes == [1, 0, 0, 0], ended.text()
    # Both nodes of the pair are reported, under the same host name.
    assert ended.text().count("GB/s within the node") == 2
    assert "GB/s, at least 1e+06 required" in ended.text()
