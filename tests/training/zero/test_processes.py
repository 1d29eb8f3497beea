"""ZeRO-2 and ZeRO-3: losses, gradients and weights equal one process's, however often a step uses a layer."""

import json
from pathlib import Path

import pytest
import torch

from forked import launched, run_script

WORKER = Path(__file__).with_name("zero_worker.py")
TOLERANCE = 1e-5


RUN = {
    "task": "document",
    "accumulation": 1,
    "checkpointing": "none",
    "bucket": 50_000_000,
    "frozen": False,
    "spoilt": False,
    "uneven": False,
}


def case(stage, **changes):
    """Build the settings of a case; other keywords are fields of the model's configuration."""
    fields = {name: value for name, value in changes.items() if name not in RUN}
    return RUN | {"stage": stage, "fields": fields} | {k: v for k, v in changes.items() if k in RUN}


CASES = {
    2: {
        "zero2-document": case(2),
        "zero2-document-accumulated": case(2, accumulation=2),
        "zero2-sections-small-buckets": case(2, task="sections", bucket=500),
        "zero2-windows-accumulated-by-layer": case(
            2, task="sections", accumulation=2, bptt_depth=1, checkpointing="layer"
        ),
        "zero2-windows-by-segment": case(2, task="sections", bptt_depth=0, checkpointing="segment", bucket=500),
        "zero2-top-windows": case(2, task="sections", bptt_depth=1, recurrence="top"),
        "zero2-wavefront": case(2, bptt_depth=1, schedule="wavefront"),
        "zero2-pre-norm": case(2, normalize_before=True, wraps_last_label=True, bptt_depth=1),
        "zero2-untied": case(2, tie_word_embeddings=False),
        "zero2-frozen": case(2, frozen=True),
        "zero2-spoilt": case(2, spoilt=True, accumulation=2),
        "zero2-uneven": case(2, uneven=True, bptt_depth=1),
        "zero3-frozen": case(3, frozen=True),
        "zero3-spoilt": case(3, spoilt=True, accumulation=2),
        # with batches sized in tokens, one rank has one document and the other has three, with different numbers of
        # segments
        "zero3-uneven": case(3, uneven=True, bptt_depth=1),
        # outside the window, the three documents have more tokens than the vocabulary, the single document has fewer
        "zero3-uneven-vocabulary": case(3, uneven=True, bptt_depth=0),
        "zero3-uneven-windows": case(3, uneven=True, task="sections", bptt_depth=1, schedule="wavefront"),
        "zero3-document": case(3),
        "zero3-document-accumulated": case(3, accumulation=2),
        "zero3-untied-bptt-accumulated": case(3, tie_word_embeddings=False, bptt_depth=1, accumulation=2),
        "zero3-document-bptt-small-buckets": case(3, bptt_depth=1, bucket=500),
        # the documents of one rank fit the window, the documents of the other rank do not
        "zero3-document-bptt-on-one-process": case(3, bptt_depth=3),
        "zero3-sections-concat": case(3, task="sections", prefix_attention="concat"),
        "zero3-windows-accumulated-by-layer": case(
            3, task="sections", accumulation=2, bptt_depth=1, checkpointing="layer"
        ),
        "zero3-windows-by-segment": case(3, task="sections", bptt_depth=0, checkpointing="segment", bucket=500),
        "zero3-windows-memory": case(3, task="sections", bptt_depth=1, decoder_context="memory"),
        "zero3-windows-section": case(3, task="sections", bptt_depth=1, decoder_context="section", context_segments=3),
        "zero3-document-all-top": case(3, bptt_depth=1, decoder_context="all", recurrence="top"),
        "zero3-wavefront-accumulated": case(3, accumulation=2, schedule="wavefront", bucket=500),
        # segments before the window run without an autograd graph; one rank has no segments there
        "zero3-wavefront-bptt-by-layer": case(3, bptt_depth=2, schedule="wavefront", checkpointing="layer"),
        "zero3-wavefront-windows-by-segment": case(
            3, task="sections", bptt_depth=1, schedule="wavefront", checkpointing="segment"
        ),
        "zero3-pre-norm": case(3, normalize_before=True, wraps_last_label=True, bptt_depth=1, accumulation=2),
        "zero3-pre-norm-wavefront-uneven": case(
            3, normalize_before=True, uneven=True, task="sections", bptt_depth=1, schedule="wavefront"
        ),
        "zero3-document-static": case(3, decoder_context="all", recurrence="none", checkpointing="segment"),
    },
    1: {
        "one-process-zero2": case(2, accumulation=2),
        "one-process-zero3": case(3, accumulation=2),
    },
}


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=CASES, ids=lambda n: f"{n} processes")
def results(request, tmp_path_factory):
    """Run all cases for a world size in one start of its processes."""
    output = tmp_path_factory.mktemp("zero") / "results.pt"
    cases = CASES[request.param]
    environments = launched(request.param)
    # 90 s on two idle cores; some minutes beside other work
    ended = run_script(WORKER, json.dumps(list(cases.values())), output, environments=environments, timeout=800)
    assert set(ended.codes) == {0}, ended.text()
    return dict(zip(cases, torch.load(output, weights_only=True), strict=True))


def differs(found, expected):
    """Return True beyond 1e-5 of the largest entry; float32 resolves 1e-7 of a gradient of norm 1."""
    return float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max()) + 1e-7


def differing(result):
    """Return the names of losses, norms, gradients and weights that differ from one process."""
    found, expected = result["zero"], result["alone"]
    for what in ("losses", "norms"):
        if differs(torch.tensor(found[what]), torch.tensor(expected[what])):
            yield what, found[what], expected[what]
    pairs = [*zip(found["gradients"], expected["gradients"], strict=True), (found["weights"], expected["weights"])]
    for step, (tensors, expected_tensors) in enumerate(pairs):
        assert tensors.keys() == expected_tensors.keys()
        yield from ((step, key) for key in tensors if differs(tensors[key], expected_tensors[key]))


# one test and not two: pytest-xdist might run two tests in two processes, and each would start all cases
@pytest.mark.distributed
@pytest.mark.slow
def test_zero_equals_one_process(results):
    """Compare each case with one process.

    ZeRO-3 reduces each bucket to the same bits as DeepSpeed's code. If one rank's loss is not finite, all ranks skip
    the step.
    """
    for name, result in results.items():
        assert list(differing(result)) == [], name
        skipped, have_same_bits = result["zero"]["skipped"], result["zero"]["have_same_bits"]
        assert all(map(bool, have_same_bits)) == ("zero3" in name), name
        assert all(map(all, have_same_bits)), name
        said = [f"step 2 is skipped: the loss was not finite on rank {len(skipped) - 1}"] if "spoilt" in name else []
        assert skipped == [said] * len(skipped), name
