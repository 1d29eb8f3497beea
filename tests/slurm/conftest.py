"""What the tests of batch scripts share: a cluster."""

import pytest

from slurm.cluster import Cluster, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = install()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started
