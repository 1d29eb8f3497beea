"""State of a rank: random numbers of a resumed run, and metrics sum_metrics over ranks."""

import pytest
import torch

from recurrent_bart.checkpointing.process_state import (
    continue_random_states,
    process_state,
    reseed_random_states,
    sum_metrics,
)


def draw_after(seed, step):
    torch.manual_seed(seed)
    reseed_random_states(step)
    return torch.rand(4)


def test_saved_random_states_go_on_where_they_were():
    torch.rand(7)
    saved = process_state({"loss": 1.5})
    assert saved["figures"] == {"loss": 1.5}
    expected = torch.rand(4)
    torch.rand(9)
    continue_random_states(saved["random_states"])
    assert torch.equal(torch.rand(4), expected)


def test_each_seed_and_each_step_draws_other_numbers():
    # the ranks of a run have consecutive seeds, and so may the steps at which it is resumed
    cases = [(seed, step) for seed in (1, 2, 3) for step in (0, 1, 2, 500)]
    drawn = {tuple(draw_after(seed, step).tolist()) for seed, step in cases}
    assert len(drawn) == len(cases)
    assert torch.equal(draw_after(2, 500), draw_after(2, 500))


def test_numbers_drawn_before_do_not_matter():
    torch.manual_seed(5)
    torch.rand(100)
    reseed_random_states(3)
    assert torch.equal(torch.rand(4), draw_after(5, 3))


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_counters_are_summed_over_ranks_but_steps_and_seconds_are_shared(n_ranks):
    ranks = [
        {"loss": 1.5 + rank, "n_targets": 7.0, "n_tokens": 90.0, "data_seconds": 0.25, "n_steps": 3.0, "seconds": 8.0}
        for rank in range(n_ranks)
    ]
    assert sum_metrics(ranks) == {
        "loss": sum(1.5 + rank for rank in range(n_ranks)),
        "n_targets": 7.0 * n_ranks,
        "n_tokens": 90.0 * n_ranks,
        "data_seconds": 0.25 * n_ranks,
        "n_steps": 3.0,
        "seconds": 8.0,
    }
