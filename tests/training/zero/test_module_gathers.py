"""ZeRO-3 with our gathers, reductions and updates equals DeepSpeed's code bit for bit."""

import pytest

from compared_steps import assert_equal_bits, case, run_cases

OFFLOAD = {"device": "cpu"}
CASES = {
    2: {
        "bf16-evaluated-saved": case(evaluates=True, saves=True),
        "fp32-untied-three-passes": case(bf16=False, n_passes=3, fields={"tie_word_embeddings": False}),
        "bf16-two-passes-by-layer": case(n_passes=2, checkpointing="layer", evaluates=True),
        "frozen-without-prefetch": case(frozen=True, n_passes=2, zero={"stage3_prefetch_bucket_size": 0}),
        "persistent": case(zero={"stage3_param_persistence_threshold": 20, "contiguous_gradients": True}),
        "small-buckets": case(zero={"reduce_bucket_size": 500}, fields={"schedule": "wavefront"}),
        "offloaded-optimizer": case(zero={"offload_optimizer": OFFLOAD}, n_passes=2, evaluates=True),
        "offloaded": case(zero={"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}),
        "beyond-the-limit": case(zero={"stage3_max_reuse_distance": 1000}),
    },
    1: {"one-process": case(n_passes=2, evaluates=True, saves=True)},
}
# cases in which DeepSpeed's code gathers the parameters
BY_DEEPSPEED = {"offloaded", "beyond-the-limit"}


@pytest.fixture(scope="module", params=CASES, ids=lambda n: f"{n} processes")
def results(request, tmp_path_factory):
    """Run all cases for a world size in one start of its processes."""
    return run_cases(CASES[request.param], request.param, tmp_path_factory.mktemp("gathers") / "results.pt")


# one test and not two: pytest-xdist might run two tests in two processes, and each would start all cases
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_equal_deepspeeds_bit_for_bit(results):
    """Compare losses, gradients and weights of several steps.

    A pass gathers the embedding, the encoder and the decoder once each; if untied, also the decoder's embedding and the
    head. Parameters are sharded after each backward pass and after each update, except persistent ones.
    """
    for name, (found, expected) in results.items():
        assert_equal_bits(name, found, expected)
        settings = next(cases[name] for cases in CASES.values() if name in cases)
        is_tied = settings["fields"].get("tie_word_embeddings", True)
        n_gathers = 0 if name in BY_DEEPSPEED else settings["n_passes"] * (3 if is_tied else 5)
        assert found["gathers"] == [n_gathers] * 3, name
        assert expected["gathers"] == [0] * 3, name
        if name not in BY_DEEPSPEED:
            assert all(found["is_sharded"]) == (name != "persistent"), name
