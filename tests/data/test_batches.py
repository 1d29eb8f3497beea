"""Segmentation and collation of documents, and the order of batches, which depends only on the seed and the step."""

import itertools

import pytest
import torch

from recurrent_bart.data.batches import BatchOrder, Collator, RankBatches, SegmentSizes, plan_documents

BOS, PAD, EOS = 0, 1, 2


def make_collator(task="document", segment_size=6, input_size=6, max_n_segments=-1, max_target_length=8):
    sizes = SegmentSizes(segment_size, input_size, max_n_segments)
    return Collator(task, sizes, [BOS], [EOS], PAD, max_target_length)


def row(sections, summaries, index=0):
    """Build a row from the lengths of sections and summaries; each id encodes its origin."""
    return {
        "index": index,
        "sections": [[10 * number + i for i in range(length)] for number, length in enumerate(sections, start=1)],
        "summaries": [[100 * number + i for i in range(length)] for number, length in enumerate(summaries, start=1)],
    }


def test_a_document_batch_holds_segments_and_one_target_per_row():
    batch = make_collator()([row([6], [2], index=5), row([3], [1], index=9)])
    assert batch.input_ids.tolist() == [
        [[BOS, 10, 11, 12, 13, EOS], [BOS, 14, 15, EOS, PAD, PAD]],
        [[BOS, 10, 11, 12, EOS, PAD], [PAD] * 6],
    ]
    assert batch.attention_mask.tolist() == [
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 1, 0], [0] * 6],
    ]
    assert batch.labels.tolist() == [[BOS, 100, 101, EOS], [BOS, 100, EOS, -100]]
    assert batch.indices == [5, 9]
    assert (batch.n_targets(), batch.n_tokens()) == (7, 15)


def test_all_tensors_of_a_batch_are_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1000)
    batch = make_collator()([row([6], [2], index=5)])
    pinned = batch.pin_memory()
    assert torch.equal(pinned.input_ids, batch.input_ids + 1000)
    assert torch.equal(pinned.attention_mask, batch.attention_mask + 1000)
    assert torch.equal(pinned.labels, batch.labels + 1000)
    assert pinned.indices == [5]


def test_a_token_with_the_pad_id_is_not_padding():
    document = {"index": 0, "sections": [[PAD, 7]], "summaries": [[8]]}
    batch = make_collator()([document, row([4], [1])])
    assert batch.attention_mask[0, 0].tolist() == [1, 1, 1, 1, 0, 0]


def test_the_target_of_a_section_belongs_to_its_last_segment():
    batch = make_collator("sections")([row([5, 2, 4], [2, 0, 1]), row([1], [1])])
    assert batch.input_ids.shape == (2, 4, 6)
    ignored = [-100] * 4
    assert batch.labels.tolist() == [
        [ignored, [BOS, 100, 101, EOS], ignored, [BOS, 300, EOS, -100]],
        [[BOS, 100, EOS, -100], ignored, ignored, ignored],
    ]


def test_segments_repeat_the_end_of_the_previous_segment_as_overlap():
    segments, _ = make_collator(input_size=8).segments(row([6], [1]))
    assert segments == [[BOS, 10, 11, 12, 13, EOS], [BOS, 12, 13, 14, 15, EOS]]


def test_a_document_is_cut_at_the_limit_and_the_cut_section_keeps_its_target():
    segments, targets = make_collator("sections", max_n_segments=3).segments(row([4, 9, 4], [1, 1, 1]))
    assert segments == [[BOS, 10, 11, 12, 13, EOS], [BOS, 20, 21, 22, 23, EOS], [BOS, 24, 25, 26, 27, EOS]]
    assert targets == [[BOS, 100, EOS], [], [BOS, 200, EOS]]


def test_a_section_without_tokens_is_skipped():
    segments, targets = make_collator("sections").segments(row([2, 0, 2], [1, 1, 1]))
    assert segments == [[BOS, 10, 11, EOS], [BOS, 30, 31, EOS]]
    assert targets == [[BOS, 100, EOS], [BOS, 300, EOS]]


def test_a_cut_target_still_has_its_end_token():
    _, targets = make_collator(max_target_length=5).segments(row([2], [9]))
    assert targets == [[BOS, 100, 101, 102, EOS]]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task='chapters': allowed are 'document', 'sections'"):
        make_collator("chapters")


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("max_n_segments", [-1, 1, 3])
@pytest.mark.parametrize("overlap", [0, 2])
def test_the_plan_equals_the_batches_of_the_collator(task, max_n_segments, overlap):
    """Lengths are close to each multiple of a segment's room, with and without targets."""
    random = torch.Generator().manual_seed(1)
    rows = [row([length], [1]) for length in range(1, 15)]
    if task == "sections":
        for _ in range(60):
            lengths = torch.randint(0, 10, (4,), generator=random).tolist()
            rows.append(row([*lengths, 3], torch.randint(0, 2, (5,), generator=random).tolist()))
    collator = make_collator(task, 6, 6 + overlap, max_n_segments)
    plan = plan_documents(
        [[len(section) for section in r["sections"]] for r in rows],
        [[len(summary) for summary in r["summaries"]] for r in rows],
        collator.sizes,
        n_special=2,
    )
    whole = make_collator(task, 6, 6 + overlap)
    made = [collator.segments(r) for r in rows]
    has_target = [any(targets) for _, targets in made]
    assert plan.indices == [index for index, has in enumerate(has_target) if has]
    assert plan.n_left_out == has_target.count(False)
    assert plan.n_segments == [len(made[index][0]) for index in plan.indices]
    assert plan.n_cut == sum(len(whole.segments(rows[i])[0]) > len(made[i][0]) for i in plan.indices)


def test_the_shortest_cut_keeps_the_first_target():
    rows = [row([5], [2]), row([9, 5], [0, 1]), row([0, 3, 7], [2, 0, 2])]
    lengths = [[len(section) for section in r["sections"]] for r in rows]
    targets = [[len(summary) for summary in r["summaries"]] for r in rows]
    collator = make_collator("sections", segment_size=6)
    plan = plan_documents(lengths, targets, collator.sizes, n_special=2)
    assert plan.n_least == [1, 4, 2]
    for document, n_least in zip(rows, plan.n_least, strict=True):
        for cut, has_target in ((n_least, True), (n_least - 1, False)):
            segments, found = collator.segments(document | {"max_n_segments": cut})
            assert len(segments) == cut
            assert any(found) == has_target


def test_segments_without_room_for_text_are_refused():
    with pytest.raises(ValueError, match="segment_size=3 must be more than 3, the number of special tokens"):
        plan_documents([[5]], [[1]], SegmentSizes(3, 3, -1), n_special=3)


def make_order(n_documents=23, global_batch=4, seed=7, pool=3):
    lengths = torch.randint(1, 9, (n_documents,), generator=torch.Generator().manual_seed(0)).tolist()
    return BatchOrder(lengths, global_batch, seed, pool)


@pytest.mark.parametrize(("n_documents", "global_batch"), [(23, 4), (24, 4), (5, 4), (3, 7), (1, 2), (200, 2)])
def test_every_document_is_read_once_per_round(n_documents, global_batch):
    """After each document, the numbers of reads of two documents differ by at most 1."""
    order = make_order(n_documents, global_batch)
    counts = torch.zeros(n_documents, dtype=torch.long)
    for step in range(6 * order.pool):
        counts += torch.bincount(torch.tensor(order.step_indices(step)), minlength=n_documents)
        assert counts.max() - counts.min() <= 1
    assert counts.sum() == 6 * order.pool * global_batch
    assert order.epoch(6 * order.pool) == pytest.approx(float(counts.float().mean()))


def test_a_step_does_not_depend_on_earlier_steps():
    steps = [make_order().step_indices(step) for step in range(30)]
    for step in (29, 0, 13):
        assert make_order().step_indices(step) == steps[step]


def test_the_order_differs_by_round_and_seed():
    order = make_order(n_documents=24)
    first, second = ([order.step_indices(step) for step in range(start, start + 6)] for start in (0, 6))
    assert first != second
    assert first != [make_order(n_documents=24, seed=8).step_indices(step) for step in range(6)]


def test_a_round_and_a_pool_with_the_same_number_are_drawn_differently():
    order = make_order(n_documents=24)
    assert order.permutation(24, "round", 1).tolist() != order.permutation(24, "pool", 1).tolist()


def test_documents_of_a_batch_have_similar_lengths_and_batches_are_not_sorted():
    lengths = torch.randint(1, 60, (640,), generator=torch.Generator().manual_seed(0))
    order = BatchOrder(lengths.tolist(), global_batch=8, seed=0)
    batches = [lengths[order.step_indices(step)] for step in range(80)]
    padding = sum(int((batch.max() - batch).sum()) for batch in batches)
    unsorted = sum(int((batch.max() - batch).sum()) for batch in lengths.view(80, 8))
    assert padding < unsorted / 5
    assert [int(batch[0]) for batch in batches] != sorted(int(batch[0]) for batch in batches)


def test_batches_of_later_epochs_have_similar_lengths_too():
    """The number of documents is no multiple of the batch, so a batch of each epoch has documents of the next one."""
    lengths = torch.randint(1, 60, (637,), generator=torch.Generator().manual_seed(0))
    order = BatchOrder(lengths.tolist(), global_batch=8, seed=0)
    batches = [lengths[order.step_indices(step)] for step in range(160, 240)]
    spreads = sorted(int(batch.max() - batch.min()) for batch in batches)
    # the batches at both ends of an epoch, and the widest batches of the pools
    assert spreads[-4] < 20


@pytest.mark.parametrize("sizes", [(4, 2), (4, 8), (4, 3, 5, 1), (2, 6, 4)])
def test_a_change_of_step_size_repeats_and_loses_no_document(sizes):
    lengths = make_order(n_documents=48).n_segments.tolist()
    unit, read, step = sizes[0], [], 0
    for size in sizes:
        order = BatchOrder(lengths, size, 7, pool=3, unit=unit, first_step=step, first_document=len(read))
        for _ in range(12 // size):
            assert len(order.step_indices(step)) == size
            read += order.step_indices(step)
            step += 1
    size = sizes[-1]
    while len(read) + size <= 96:
        read += order.step_indices(step)
        step += 1
        assert order.epoch(step) == pytest.approx(len(read) / 48)
    # Each epoch is complete before the next one begins.
    assert sorted(read[:48]) == list(range(48))
    assert torch.bincount(torch.tensor(read)).max() == 2


def test_a_return_to_the_first_step_size_gives_the_original_steps():
    order = make_order(n_documents=48)
    lengths = order.n_segments.tolist()
    # Two steps of half the size are in between.
    later = BatchOrder(lengths, 4, 7, pool=3, unit=4, first_step=4, first_document=12)
    assert [later.step_indices(step) for step in range(4, 20)] == [order.step_indices(step) for step in range(3, 19)]


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_seeds_may_have_any_size(seed):
    assert len(make_order(seed=seed).step_indices(10**6)) == 4


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 6), (2, 3), (3, 2), (6, 1)])
def test_any_number_of_ranks_share_the_documents_of_a_step(world_size, accumulation):
    order = make_order(n_documents=50, global_batch=12)
    for first_step in (0, 3):
        ranks = [
            list(itertools.islice(RankBatches(order, first_step, rank, world_size, accumulation), 2 * accumulation))
            for rank in range(world_size)
        ]
        for step in range(2):
            parts = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
            assert {len(part) for part in parts} == {12 // world_size // accumulation}
            assert sorted(itertools.chain(*parts)) == sorted(order.step_indices(first_step + step))


def test_ranks_read_documents_of_similar_length_at_the_same_time():
    lengths = list(range(1, 25))
    order = BatchOrder(lengths, global_batch=24, seed=0)
    first, second = (list(itertools.islice(RankBatches(order, 0, rank, 2, 3), 3)) for rank in range(2))
    for one, other in zip(first, second, strict=True):
        assert abs(max(lengths[i] for i in one) - max(lengths[i] for i in other)) <= 1
