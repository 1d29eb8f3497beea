"""Document order of a run: built from its flags, and continued from a stored position."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import SegmentSizes
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.document_order import build_order, describe_data_order, store_data_position

LENGTHS = [1, 2, 3, 4, 1, 2, 8, 1] * 5
TOKENS = ["--tokens_per_batch", "70"]
TWO = ["--per_device_train_batch_size", "2"]


@pytest.fixture
def prepared():
    """Prepare documents with segments of ten tokens."""
    return prepared_with(SegmentSizes(10, 10, 8))


def plan_of(sizes):
    """Plan documents of 10 tokens per entry of LENGTHS; a document has its target in its last segment."""
    n_segments = [-(-10 * length // sizes.segment_size) for length in LENGTHS]
    indices = [index for index, n in enumerate(n_segments) if n <= 2 * sizes.max_n_segments]
    return SimpleNamespace(indices=indices, n_segments=[min(n_segments[i], sizes.max_n_segments) for i in indices])


@dataclass
class Planner:
    """Collator of the documents of `plan_of`."""

    sizes: SegmentSizes

    def plan(self, rows):
        return plan_of(self.sizes)


def prepared_with(sizes):
    documents = SimpleNamespace(plan=plan_of(sizes), corpus=None, collator=Planner(sizes))
    return SimpleNamespace(splits={"train": documents}, config=SimpleNamespace(input_size=10))


def documents_of(order, step):
    return [document for part in order.micro_batches(step, 2, 1) for batch in part for document in batch]


@pytest.mark.parametrize("flags", [TOKENS, TWO], ids=["tokens", "documents"])
def test_it_goes_on_from_the_place_that_was_written_down(prepared, flags):
    order = build_order(parse_arguments(flags), prepared, 2, TrainerState())
    state = TrainerState(step=5)
    store_data_position(order, state)
    assert state.n_documents == sum(len(documents_of(order, step)) for step in range(5))
    resumed = build_order(parse_arguments(flags), prepared, 2, state)
    assert [documents_of(resumed, step) for step in range(5, 30)] == [documents_of(order, s) for s in range(5, 30)]


def test_batches_of_other_sizes_go_on_in_the_order_of_the_first(prepared):
    """Resume twice, each time with another batch size, within one pass through the documents."""
    state, read = TrainerState(), []
    for size, n_steps in ((4, 2), (8, 2), (2, 8)):
        order = build_order(parse_arguments(["--per_device_train_batch_size", str(size // 2)]), prepared, 2, state)
        for step in range(state.step, state.step + n_steps):
            assert len(documents_of(order, step)) == size
            read += documents_of(order, step)
        state.step += n_steps
        store_data_position(order, state)
        assert (state.n_documents, state.order_batch) == (len(read), 4)
    assert sorted(read) == list(range(len(LENGTHS)))


@pytest.mark.parametrize(
    "later", [SegmentSizes(10, 10, 4), SegmentSizes(5, 5, 8), SegmentSizes(20, 20, 8)], ids=["most", "half", "double"]
)
def test_a_run_with_other_segments_reads_each_document_once_per_epoch(prepared, later):
    """Resume within an epoch with another --max_n_segments or --segment_size, and then with the first again."""
    state, read = TrainerState(), []
    for sizes, n_steps in ((SegmentSizes(10, 10, 8), 4), (later, 5), (SegmentSizes(10, 10, 8), 11)):
        order = build_order(parse_arguments(TWO), prepared_with(sizes), 1, state)
        read += [document for step in range(state.step, state.step + n_steps) for document in documents_of(order, step)]
        state.step += n_steps
        store_data_position(order, state)
    assert sorted(read) == list(range(len(LENGTHS)))


def test_other_segments_that_lose_targets_or_change_batches_are_refused(prepared):
    state = TrainerState()
    order = build_order(parse_arguments(TWO), prepared, 1, state)
    state.step = 3
    store_data_position(order, state)
    with pytest.raises(ValueError, match=r"--max_n_segments: 40 documents had a target .* now 35"):
        build_order(parse_arguments(TWO), prepared_with(SegmentSizes(10, 10, 3)), 1, state)
    state.order_batch = 0
    with pytest.raises(ValueError, match="--segment_size or --input_size: with --tokens_per_batch"):
        build_order(parse_arguments(TOKENS), prepared_with(SegmentSizes(5, 5, 8)), 1, state)


def test_a_checkpoint_without_sizes_goes_on(prepared):
    """Older checkpoints do not store the sizes of segments."""
    state = TrainerState(step=3, n_documents=6, order_batch=2)
    order = build_order(parse_arguments(TWO), prepared_with(SegmentSizes(10, 10, 4)), 1, state)
    assert len(documents_of(order, 3)) == 2


def test_a_number_of_tokens_is_one_of_whole_segments_and_rules_over_that_of_documents(prepared):
    order = build_order(parse_arguments([*TOKENS, *TWO]), prepared, 1, TrainerState())
    parts = [part for step in range(40) for (part,) in order.micro_batches(step, 1, 1)]
    assert max(len(part) * max(LENGTHS[i] for i in part) for part in parts if len(part) > 1) <= 7
    assert {len(part) for part in parts} > {1, 2, 3}


def test_a_lower_number_is_heeded_at_once_and_kept_apart_from_that_of_the_round(prepared):
    state = TrainerState(step=1)
    store_data_position(build_order(parse_arguments(["--tokens_per_batch", "160"]), prepared, 2, TrainerState()), state)
    order = build_order(parse_arguments(["--tokens_per_batch", "80"]), prepared, 2, state)
    assert max(len(documents_of(order, step)) for step in range(1, 3)) <= 16
    state.step = 2
    store_data_position(order, state)
    assert state.order_segments == 16
    state.step = 100
    store_data_position(order, state)
    assert state.order_segments == 8


def test_a_run_that_was_begun_without_goes_on_without(prepared):
    state = TrainerState(step=1)
    store_data_position(build_order(parse_arguments(TWO), prepared, 2, TrainerState()), state)
    with pytest.raises(ValueError, match="--tokens_per_batch 70: the run was started without this flag"):
        build_order(parse_arguments(TOKENS), prepared, 2, state)


def of_length(flags, max_steps):
    arguments = parse_arguments(flags)
    return replace(arguments, run=arguments.run.of_length(max_steps))


def test_a_step_and_its_padding_are_told(prepared):
    arguments = of_length([*TWO, "--eval_every", "7"], 20)
    order = build_order(arguments, prepared, 2, TrainerState())
    steps, padding = describe_data_order(arguments, prepared, 2, order)
    assert steps == (
        "steps      20 of 4 documents = 2 per device x 1 accumulated x 2 processes; 2.0 epochs, evaluated every 7 steps"
    )
    share = f"{100 * order.padding(20, 2, 1):.1f} %"
    assert padding == f"padding    {share} of the computed segments hold no text"
    arguments = of_length([*TWO, *TOKENS], 20)
    order = build_order(arguments, prepared, 2, TrainerState())
    steps, padding = describe_data_order(arguments, prepared, 2, order)
    assert steps.startswith("steps      20 of up to 70 tokens per device x 1 accumulated x 2 processes; ")
    assert steps.endswith("epochs, evaluated every 25 steps; 5 documents have more, each in a separate batch")
    own = f"{100 * order.padding(20, 2, 1):.1f} %"
    assert padding == (f"padding    {own} of the computed segments hold no text; {share} in batches of 2 documents")
    assert own != share


@pytest.mark.parametrize("flags", [TOKENS, TWO], ids=["tokens", "documents"])
def test_another_seed_reads_no_document_again(prepared, flags):
    state = TrainerState()
    order = build_order(parse_arguments(flags), prepared, 2, state)
    state.step = 5
    store_data_position(order, state)
    resumed = build_order(parse_arguments([*flags, "--seed", "7"]), prepared, 2, state)
    assert [documents_of(resumed, step) for step in range(5, 30)] == [documents_of(order, s) for s in range(5, 30)]
    other = build_order(parse_arguments([*flags, "--seed", "7"]), prepared, 2, TrainerState())
    assert documents_of(other, 5) != documents_of(order, 5)
