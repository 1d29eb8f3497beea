"""Batches with a limit on segments, in an order that depends only on the seed and the step."""

import itertools

import pytest
import torch

from recurrent_bart.data import token_batches
from recurrent_bart.data.batches import BatchOrder, RankBatches
from recurrent_bart.data.token_batches import TokenBatchOrder, group_by_segments

N_DOCUMENTS, MOST = 300, 12
LENGTHS = torch.randint(1, 11, (N_DOCUMENTS,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Reduce the window, so that an epoch has several windows, and the last one is shorter."""
    monkeypatch.setattr(token_batches, "WINDOW", 128)


def make_order(n_batches=1, seed=7, **place):
    return TokenBatchOrder(LENGTHS, place.pop("most", MOST), n_batches, seed, **place)


def batches_of(order, first_step, n_steps):
    """Return the batches as one rank reads them."""
    return list(itertools.islice(RankBatches(order, first_step, 0, 1, order.n_batches), n_steps * order.n_batches))


def round_of(order):
    """Return the batches of one epoch."""
    batches, n_read = [], 0
    for batch in RankBatches(order, 0, 0, 1, 1):
        batches.append(batch)
        n_read += len(batch)
        if n_read >= N_DOCUMENTS:
            return batches
    raise AssertionError


def n_computed(batch):
    return len(batch) * max(LENGTHS[document] for document in batch)


def test_a_batch_holds_as_many_documents_as_fit_and_little_padding():
    lengths = [3, 1, 9, 2, 2, 4, 20, 1]
    groups = group_by_segments(lengths, most=8)
    assert [[lengths[place] for place in group] for group in groups] == [[20], [9], [4, 3], [2, 2, 1, 1]]
    assert sorted(itertools.chain(*groups)) == list(range(8))


def test_every_document_is_read_once_per_round_and_no_batch_is_too_large():
    order = make_order()
    batches = batches_of(order, 0, 2000)
    read = list(itertools.chain(*batches))
    for start in range(0, len(read) - N_DOCUMENTS, N_DOCUMENTS):
        assert sorted(read[start : start + N_DOCUMENTS]) == list(range(N_DOCUMENTS))
    assert max(map(n_computed, batches)) <= MOST
    # All batches are nearly full, apart from the last one of each window and from room that no whole document fits
    # into.
    assert sum(map(n_computed, batches)) > 0.75 * MOST * len(batches)


def test_batches_by_tokens_have_less_padding_than_batches_by_documents():
    by_tokens = make_order().padding(100, 1, 1)
    computed = sum(map(n_computed, batches_of(make_order(), 0, 100)))
    needed = sum(LENGTHS[document] for batch in batches_of(make_order(), 0, 100) for document in batch)
    assert by_tokens == pytest.approx(1 - needed / computed)
    assert by_tokens < BatchOrder(LENGTHS, 2, 7, pool=1).padding(100, 1, 1) / 3


def test_the_order_is_not_by_length_and_differs_by_round_and_seed():
    order = make_order()
    first = round_of(order)
    longest = [LENGTHS[batch[0]] for batch in first]
    # Batches sorted by length would have one rise per window.
    assert sum(later > earlier for earlier, later in itertools.pairwise(longest)) > len(first) / 4
    second = batches_of(order, len(first), len(first))
    assert first != second
    # Batches of two epochs have different documents. Many documents have the same length, so groups can differ.
    together, again = ({frozenset(batch) for batch in batches if len(batch) > 1} for batches in (first, second))
    assert len(together & again) < len(together) / 4
    assert first != round_of(make_order(seed=8))


def test_a_step_does_not_depend_on_earlier_steps():
    steps = [make_order(3).micro_batches(step, 1, 3) for step in range(90)]
    order = make_order(3)
    for step in (89, 0, 40, 41, 3):
        assert order.micro_batches(step, 1, 3) == steps[step]
        assert order.documents_before(step) == sum(len(batch) for parts in steps[:step] for (batch,) in parts)
        assert order.epoch(step) == order.documents_before(step) / N_DOCUMENTS


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_any_number_of_ranks_share_the_batches_of_a_step(world_size, accumulation):
    order = make_order(6)
    for step in (0, 50):
        alone = {tuple(batch) for (batch,) in order.micro_batches(step, 1, 6)}
        parts = order.micro_batches(step, world_size, accumulation)
        # All ranks make the same number of passes, so that they meet in each.
        assert [len(part) for part in parts] == [world_size] * accumulation
        assert {tuple(batch) for part in parts for batch in part} == alone
    longest = [[max(LENGTHS[i] for i in batch) for batch in part] for part in parts]
    assert sorted(itertools.chain(*longest), reverse=True) == list(itertools.chain(*longest))


def goes_on(order, step, n_batches, most=MOST):
    """Return the order of a run that is resumed after `step` steps."""
    place = {"first_document": order.documents_before(step), "first_most": order.most_segments(step)}
    return make_order(n_batches, most=most, first_step=step, **place)


@pytest.mark.parametrize("step", [0, 1, 17, 40, 75, 120])
def test_a_resumed_run_reads_the_same_batches(step):
    order = make_order(2)
    resumed = goes_on(order, step, 2)
    assert batches_of(resumed, step, 150) == batches_of(order, step, 150)
    # Resume a second time in the same epoch.
    assert batches_of(goes_on(resumed, step + 2, 2), step + 2, 150) == batches_of(order, step + 2, 150)


def test_a_different_number_of_ranks_continues_with_the_same_batches():
    order = make_order(2)
    before, after = batches_of(order, 0, 10), batches_of(goes_on(order, 10, 3), 10, 20)
    assert sorted(before + after) == sorted(batches_of(make_order(1), 0, 2 * 10 + 3 * 20))


@pytest.mark.parametrize("sizes", [(12, 6, 20), (12, 24, 12), (30, 4, 12)])
def test_a_change_of_batch_size_repeats_and_loses_no_document(sizes):
    """A run that is resumed twice with a smaller limit, after running out of memory, within one epoch."""
    order = make_order(1, most=sizes[0])
    read = batches_of(order, 0, 20)
    for size in sizes[1:]:
        order = goes_on(order, len(read), 1, most=size)
        new = batches_of(order, len(read), 15)
        assert max(map(n_computed, new)) <= max(size, max(LENGTHS))
        read += new
    documents = list(itertools.chain(*read))
    while len(documents) < 2 * N_DOCUMENTS:
        documents += batches_of(order, len(read), 1)[0]
        read.append([])
    for start in (0, N_DOCUMENTS):
        assert sorted(documents[start : start + N_DOCUMENTS]) == list(range(N_DOCUMENTS))


def test_documents_repeat_if_a_step_has_more_batches():
    order = TokenBatchOrder([2, 5], 4, 5, seed=0)
    documents = list(itertools.chain(*itertools.chain(*order.micro_batches(3, 5, 1))))
    assert len(documents) == 5
    assert set(documents) == {0, 1}
