"""Segments and targets of pretraining tasks: what is removed and recalled, and when it is drawn anew."""

import random
from itertools import pairwise
from statistics import mean

import pytest

from recurrent_bart.data.batches import SegmentSizes
from recurrent_bart.data.pretraining import CUE, PretrainingCollator, infill, poisson

BOS, PAD, EOS, MASK = 0, 1, 2, 3
FIRST = 10


def make_collator(task, segment_size=22, max_n_segments=-1, max_target_length=64):
    sizes = SegmentSizes(segment_size, segment_size, max_n_segments)
    return PretrainingCollator(task, sizes, [BOS], [EOS], PAD, max_target_length, mask_token_id=MASK)


def text(n_tokens, index=0, **fields):
    """Build a row whose ids tell their place in the text."""
    return {"index": index, "sections": [list(range(FIRST, FIRST + n_tokens))], "summaries": [[]], **fields}


def rows_of(lengths):
    """Return the column of a corpus that has the lengths of the texts."""
    return {"section_lengths": [[length] for length in lengths]}


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5, 8, 20, 100])
def test_an_infilled_text_keeps_its_order_and_has_a_mask_for_each_gap(n_tokens):
    ids = list(range(FIRST, FIRST + n_tokens))
    for seed in range(50):
        found = infill(ids, MASK, random.Random(seed))
        kept = [id for id in found if id != MASK]
        assert kept == sorted(kept)
        # a full segment must not grow
        assert len(found) <= n_tokens
        assert len(kept) == n_tokens - round(0.3 * n_tokens)
        assert all((first, second) != (MASK, MASK) for first, second in pairwise(found))
        for number, id in enumerate(found[:-1]):
            # tokens are missing only where a mask stands
            if id != MASK and found[number + 1] != MASK:
                assert found[number + 1] == id + 1


def test_a_segment_of_a_hundred_tokens_loses_spans_of_three_on_average():
    found = [infill(list(range(FIRST, FIRST + 100)), MASK, random.Random(seed)) for seed in range(400)]
    # 30 tokens in spans of 3 on average; the last span is cut, and spans of length 0 insert a mask
    assert mean(ids.count(MASK) for ids in found) == pytest.approx(10.7, abs=0.7)


def test_the_numbers_of_poisson_have_its_mean_and_variance():
    draw = random.Random(0)
    drawn = [poisson(3.0, draw) for _ in range(20_000)]
    middle = mean(drawn)
    assert middle == pytest.approx(3, abs=0.05)
    assert mean((value - middle) ** 2 for value in drawn) == pytest.approx(3, abs=0.15)


def test_the_target_of_a_denoised_segment_is_the_segment():
    segments, targets = make_collator("denoise").segments(text(45))
    ids = list(range(FIRST, FIRST + 45))
    assert targets == [[BOS, *ids[begin : begin + 20], EOS] for begin in (0, 20, 40)]
    for segment, target in zip(segments, targets, strict=True):
        assert (segment[0], segment[-1]) == (BOS, EOS)
        assert MASK in segment
        assert {*segment} - {MASK} < {*target}


def test_a_target_to_recall_follows_the_cue_in_an_earlier_segment():
    room = 30
    seen = set()
    for seed in range(60):
        segments, targets = make_collator("recall", room + 2 + CUE + 1).segments(text(4 * room, drawn_at=seed))
        assert targets[0] == []
        assert MASK not in segments[0]
        for number in range(1, 4):
            body = segments[number][1:-1]
            own, mask, cue = body[:room], body[room], body[room + 1 :]
            assert own == list(range(FIRST + number * room, FIRST + (number + 1) * room))
            assert (mask, len(cue)) == (MASK, CUE)
            begin, recalled = cue[0] - FIRST, targets[number][1:-1]
            source = begin // room
            assert source < number
            seen.add((number, source))
            # the passage goes on to the end of its segment
            assert cue + recalled == list(range(cue[0], FIRST + (source + 1) * room))
            assert recalled
    assert seen == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}


@pytest.mark.parametrize("task", ["denoise", "recall"])
def test_each_step_draws_anew_and_a_repeated_step_draws_the_same(task):
    collator = make_collator(task)
    first, again, later = (collator.segments(text(80, drawn_at=step)) for step in ("0 1", "0 1", "0 2"))
    assert first == again
    assert first != later
    assert collator.segments(text(80, index=1, drawn_at="0 1")) != first


@pytest.mark.parametrize("most", [-1, 1, 2, 3])
@pytest.mark.parametrize("task", ["denoise", "recall"])
def test_the_plan_counts_the_segments_and_targets_that_are_made(task, most):
    collator = make_collator(task, max_n_segments=most, max_target_length=12)
    lengths = [1, 11, 20, 21, 22, 40, 41, 95]
    plan = collator.plan(rows_of(lengths))
    whole = make_collator(task)
    kept, n_targets, n_read, n_long = [], 0, 0, 0
    for index, length in enumerate(lengths):
        segments, targets = collator.segments(text(length, index))
        n_targets += sum(map(bool, whole.segments(text(length, index))[1]))
        if any(targets):
            kept.append((index, len(segments)))
            n_read += sum(map(bool, targets))
            if task == "denoise":
                n_long += sum(len(target) > 12 for target in whole.segments(text(length, index))[1][: len(segments)])
        assert all(len(target) <= 12 for target in targets)
    assert list(zip(plan.indices, plan.n_segments, strict=True)) == kept
    assert plan.n_left_out == len(lengths) - len(kept)
    assert (plan.n_targets, plan.n_unread_targets) == (n_targets, n_targets - n_read)
    assert plan.n_cut_targets == n_long
    read = dict(kept)
    assert plan.n_cut == sum(len(whole.segments(text(lengths[index], index))[0]) > n for index, n in read.items())


def test_a_segment_without_room_for_a_cue_is_refused():
    with pytest.raises(ValueError, match="--task recall needs at least 20 tokens"):
        make_collator("recall", 19).plan(rows_of([100]))
    assert make_collator("recall", 20).plan(rows_of([100])).n_targets == 11
