"""ZeRO-2 with our reduction of gradients equals DeepSpeed's code bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from forked import launched, run_script
from recurrent_bart.training.zero.partition_buckets import point_to_weights

WORKER = Path(__file__).with_name("module_gathers_worker.py")
DEFAULT = {
    "fields": {},
    "zero": {},
    "bf16": True,
    "n_passes": 1,
    "checkpointing": "none",
    "frozen": False,
    "evaluates": False,
    "saves": False,
}


def case(zero=None, **changes):
    return DEFAULT | changes | {"zero": {"stage": 2} | (zero or {})}


CASES = {
    2: {
        "one-pass-saved": case(saves=True, evaluates=True),
        "two-passes-by-layer": case(n_passes=2, checkpointing="layer"),
        "frozen-three-passes": case(n_passes=3, frozen=True),
        "small-buckets": case({"reduce_bucket_size": 500}, fields={"schedule": "wavefront"}),
        "round-robin": case({"round_robin_gradients": True, "reduce_bucket_size": 3000}),
        "fp32": case(bf16=False, n_passes=2),
        "overlapped": case({"overlap_comm": True}),
        "offloaded": case({"offload_optimizer": {"device": "cpu"}}, n_passes=2),
    },
    1: {"one-process": case(saves=True, evaluates=True), "one-process-two-passes": case(n_passes=2)},
}
# cases in which DeepSpeed's code reduces the gradients
BY_DEEPSPEED = {"fp32", "overlapped", "offloaded"}


@pytest.fixture(scope="module", params=CASES, ids=lambda n: f"{n} processes")
def results(request, tmp_path_factory):
    """Run all cases for a world size in one start of its processes."""
    output = tmp_path_factory.mktemp("buckets") / "results.pt"
    cases = CASES[request.param]
    environments = launched(request.param)
    ended = run_script(WORKER, json.dumps(list(cases.values())), output, environments=environments, timeout=500)
    assert set(ended.codes) == {0}, ended.text()
    return dict(zip(cases, torch.load(output, weights_only=True), strict=True))


# one test and not two: pytest-xdist might run two tests in two processes, and each would start all cases
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_equal_deepspeeds_bit_for_bit(results):
    for name, (found, expected) in results.items():
        assert found["losses"] == expected["losses"], name
        for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            assert all(map(torch.equal, ours, theirs)), name
        assert name == "round-robin" or any(gradient.any() for gradient in found["gradients"][0]), name
        assert all(torch.equal(found["weights"][key], expected["weights"][key]) for key in expected["weights"]), name
        assert found["has_partition_buckets"] == (name not in BY_DEEPSPEED), name
        assert not expected["has_partition_buckets"], name


def test_a_parameter_that_was_moved_gets_its_weights_again():
    """Two parameters of four and two elements; the second one does not share the weights' memory."""
    weights = torch.arange(6.0)
    moved = torch.zeros(2)
    parameters = [weights[:4].view(2, 2), moved]
    calls = []

    class Optimizer:
        bit16_groups_flat, round_robin_bit16_groups, round_robin_bit16_offsets = [weights], [parameters], [[0, 4]]

        def _update_model_bit16_weights(self, number):
            calls.append(number)
            moved.data = weights[4:]

    for _ in range(2):
        point_to_weights(Optimizer(), 0)
    assert calls == [0]
    assert moved.tolist() == [4.0, 5.0]
