"""Curriculum: draws depend only on seed and step; stages end by loss or by steps."""

from collections import Counter

import pytest

from recurrent_bart.training.curriculum import Curriculum, parse_stages


def make(stages=(1, 2, 4, 8), stage_steps=100, seed=0):
    return Curriculum(stages, stage_steps, seed)


def test_every_number_of_segments_up_to_the_stages_is_drawn_as_often():
    counts = Counter(make().draw(2, step) for step in range(4000))
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(900 < count < 1100 for count in counts.values())
    assert {make().draw(0, step) for step in range(50)} == {1}


def test_what_is_drawn_depends_on_seed_and_step_alone():
    drawn = [make().draw(3, step) for step in range(100)]
    assert drawn == [make().draw(3, step) for step in range(100)]
    assert drawn != [make(seed=1).draw(3, step) for step in range(100)]


def test_a_stage_ends_when_something_is_reached_or_after_its_steps():
    curriculum = make()
    assert not curriculum.is_over(0, 99, is_reached=False)
    assert curriculum.is_over(0, 1, is_reached=True)
    assert curriculum.is_over(0, 100, is_reached=False)
    assert not make(stage_steps=0).is_over(1, 10**6, is_reached=False)


def test_the_last_stage_does_not_end():
    assert not make().is_over(3, 10**6, is_reached=True)


def test_a_stage_that_is_no_more_is_as_the_last_one():
    curriculum = make(stages=(1, 2))
    assert curriculum.longest(3) == 2
    assert {curriculum.draw(3, step) for step in range(50)} == {1, 2}
    assert not curriculum.is_over(3, 10**6, is_reached=True)


@pytest.mark.parametrize("stages", [(), (0, 1), (2, 1)])
def test_stages_that_shrink_are_refused(stages):
    with pytest.raises(ValueError, match="no number may be lower than the previous number"):
        make(stages)


def test_stages_are_written_as_numbers_with_commas():
    assert parse_stages("1,2, 16") == (1, 2, 16)
    with pytest.raises(ValueError, match="--curriculum 1,two"):
        parse_stages("1,two")
