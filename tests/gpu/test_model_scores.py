"""Scores by models are the same on a GPU as on the CPU; run with `pytest -m gpu`."""

import pytest
import torch

import scoring_models
from recurrent_bart.evaluation.model_scores import load_scorers

pytestmark = pytest.mark.gpu


def test_scores_by_models_equal_those_on_the_cpu(tmp_path):
    encoder = scoring_models.encoder(tmp_path / "encoder")
    classifier = scoring_models.classifier(tmp_path / "classifier")
    inputs = "a b c d. e f.", ["a c. d", "b g h"], "a b c d e f. g h i j k l. a d f h."
    on_cpu, on_gpu = (load_scorers(encoder, -1, classifier, torch.device(device)) for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other(*inputs) == pytest.approx(one(*inputs), rel=1e-3)
