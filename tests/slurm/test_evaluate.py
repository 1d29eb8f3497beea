"""`sbatch slurm/evaluate.sh`: the processes of both nodes share the documents."""

import json

import pytest

from slurm.training_jobs import records

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]


def test_the_metrics_equal_those_of_the_run(cluster, whole, tmp_path):
    folder, _ = whole
    given = ["--model", folder / "model", "--json", tmp_path / "figures.json"]
    job = cluster.submit("slurm/evaluate.sh", *given, options=["--nodes=2"])
    assert job.wait(100) == "COMPLETED", job.printed()
    assert "rouge1" in job.printed()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["n_documents"] == 5
    assert figures["loss"] == pytest.approx(min(records(folder, "validation_loss").values()), rel=1e-4)
