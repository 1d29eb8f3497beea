"""ZeRO-2 with our reduction of gradients equals DeepSpeed's code bit for bit."""

import pytest
import torch

from compared_steps import assert_equal_bits, case, run_cases
from recurrent_bart.training.zero.partition_buckets import point_to_weights


def zero2(zero=None, **changes):
    return case(zero={"stage": 2} | (zero or {}), **changes)


CASES = {
    2: {
        "one-pass-saved": zero2(saves=True, evaluates=True),
        "two-passes-by-layer": zero2(n_passes=2, checkpointing="layer"),
        "frozen-three-passes": zero2(n_passes=3, frozen=True),
        "small-buckets": zero2({"reduce_bucket_size": 500}, fields={"schedule": "wavefront"}),
        "round-robin": zero2({"round_robin_gradients": True, "reduce_bucket_size": 3000}),
        "fp32": zero2(bf16=False, n_passes=2),
        "overlapped": zero2({"overlap_comm": True}),
        "offloaded": zero2({"offload_optimizer": {"device": "cpu"}}, n_passes=2),
    },
    1: {"one-process": zero2(saves=True, evaluates=True), "one-process-two-passes": zero2(n_passes=2)},
}
# cases in which DeepSpeed's code reduces the gradients
BY_DEEPSPEED = {"fp32", "overlapped", "offloaded"}


@pytest.fixture(scope="module", params=CASES, ids=lambda n: f"{n} processes")
def results(request, tmp_path_factory):
    """Run all cases for a world size in one start of its processes."""
    return run_cases(CASES[request.param], request.param, tmp_path_factory.mktemp("buckets") / "results.pt")


# one test and not two: pytest-xdist might run two tests in two processes, and each would start all cases
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_equal_deepspeeds_bit_for_bit(results):
    for name, (found, expected) in results.items():
        assert_equal_bits(name, found, expected)
        assert name == "round-robin" or any(gradient.any() for gradient in found["gradients"][0]), name
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
