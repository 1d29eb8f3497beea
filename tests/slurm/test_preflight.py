"""`sbatch slurm/preflight.sh` names the bad one of two nodes."""

import sys

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]


def preflight(cluster, folder, *flags):
    """Submit the preflight script without GPU tests, because the nodes have no real GPUs."""
    job = cluster.submit("slurm/preflight.sh", "--gpus", 0, "--folder", folder, *flags)
    job.wait(150)
    return job


def test_good_nodes_pass(cluster, tmp_path):
    job = preflight(cluster, tmp_path)
    assert job.state() == "COMPLETED", job.printed()
    assert "all 2 nodes passed" in job.printed()
    assert all(f"{name}: 0 GPUs" in job.printed() for name in ("node1", "node2"))
    assert job.printed().count("GB/s with a neighbour node") == 2


def test_a_node_with_a_full_disk_is_named(cluster, tmp_path):
    cluster.inside(2, "mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tmp_path))
    try:
        job = preflight(cluster, tmp_path)
    finally:
        cluster.inside(2, "umount", str(tmp_path))
    assert job.state() == "FAILED", job.printed()
    assert f"bad node node2: {tmp_path} cannot be written (No space left on device)" in job.printed()
    assert "--exclude=node2\n" in job.printed()


def test_a_node_that_cannot_start_python_is_named(cluster, tmp_path):
    cluster.inside(2, "mount", "--bind", "/bin/false", sys.executable)
    try:
        job = preflight(cluster, tmp_path, "--wait", 15)
    finally:
        cluster.inside(2, "umount", sys.executable)
    assert job.state() == "FAILED", job.printed()
    assert "bad node node2: 1 of 1 processes did not report" in job.printed()
    assert "--exclude=node2\n" in job.printed()
