"""Fixtures for tests of batch scripts: a cluster, and an uninterrupted run on it."""

import pytest

from runs import flags
from slurm.cluster import Cluster, install
from slurm.training_jobs import CHANGES, TRAIN


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = install()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def whole(cluster, documents, tmp_path_factory):
    """Return the folder and the job of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = cluster.submit(TRAIN, *flags(documents, folder, **CHANGES))
    assert job.wait(200) == "COMPLETED", job.printed()
    return folder, job
