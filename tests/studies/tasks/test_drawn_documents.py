"""Documents drawn for several steps at once are used once each, and follow from the seed."""

import pytest
import torch

from recurrent_bart.studies.tasks.drawn_documents import STEPS_AT_ONCE, DrawnDocuments
from recurrent_bart.studies.tasks.memory_tasks import Copy


class Counting(Copy):
    n_draws = 0

    def batch(self, *arguments):
        Counting.n_draws += 1
        return super().batch(*arguments)


def documents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DrawnDocuments(Counting(n_payload=4), Copy(n_payload=2), generator, batch_size=3, segment_size=8)


def test_batches_are_as_many_documents_as_are_asked_for_with_their_answers():
    drawn = documents()
    for n_segments in (1, 4, 1):
        input_ids, labels = drawn.batch(n_segments)
        assert input_ids.shape == (3, n_segments, 8)
        assert torch.equal(input_ids[:, 0, :4], labels)


def test_one_draw_is_of_many_steps_and_no_document_comes_twice():
    drawn, before = documents(), Counting.n_draws
    batches = [drawn.batch(2)[0] for _ in range(STEPS_AT_ONCE)]
    assert Counting.n_draws == before + 1
    batches.append(drawn.batch(2)[0])
    assert Counting.n_draws == before + 2
    rows = torch.cat(batches).flatten(1)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_documents_follow_from_the_seed(seed):
    first, second = documents(), documents(seed)
    same = [torch.equal(first.batch(n)[0], second.batch(n)[0]) for n in (1, 2, 1)]
    assert all(same) if seed == 0 else not any(same)


def test_tests_are_the_same_documents_of_the_other_task_whenever_asked():
    drawn = documents()
    batches = list(drawn.tests(2, 5))
    drawn.batch(2)
    again = list(documents(seed=1).tests(2, 5))
    assert [labels.shape for _, labels in batches] == [(5, 2)]
    assert torch.equal(batches[0][0], again[0][0])
