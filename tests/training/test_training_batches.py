"""Training batches: documents in the curriculum's length, equal on all ranks and after a resume."""

import itertools
import multiprocessing

import pytest
import torch

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import BatchOrder, Collator, SegmentSizes, plan_documents
from recurrent_bart.training import training_batches as module
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.preparation import Documents
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.training_batches import TrainingBatches

N_DOCUMENTS = 40


@pytest.fixture(scope="module")
def corpus():
    """Make documents of four sections with one or two segments; the first section may have no target."""
    random = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(N_DOCUMENTS):
        lengths = torch.randint(3, 9, (4,), generator=random).tolist()
        summaries = [torch.randint(0, 2, (1,), generator=random).item(), 1, 0, 2]
        documents.append({"sections": [[7] * n for n in lengths], "summaries": [[8] * n for n in summaries]})
    return documents


def make_batches(corpus, state=None, rank=0, world_size=1, task="sections", device="cpu", **changes):
    sizes = SegmentSizes(6, 6, -1)
    lengths = ([[len(part) for part in document[name]] for document in corpus] for name in ("sections", "summaries"))
    plan = plan_documents(*lengths, sizes, n_special=2)
    documents = Documents(corpus, plan, Collator(task, sizes, [0], [2], 1, 8))
    flags = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 0, "curriculum": "1,3,6", **changes}
    order = BatchOrder(plan.n_segments, global_batch=8, seed=0)
    environment = Environment(rank, rank, world_size, torch.device(device))
    return TrainingBatches(documents, order, RunArguments(**flags), environment, state or TrainerState())


def segments_of(batch):
    return batch.attention_mask.any(dim=-1).sum(dim=1)


def same(one, other):
    return one.indices == other.indices and torch.equal(one.input_ids, other.input_ids)


def test_a_step_reads_as_many_segments_as_are_drawn_or_up_to_the_first_target(corpus):
    batches = make_batches(corpus, TrainerState(stage=2))
    plan = batches.documents.plan
    drawn_numbers = set()
    for number, batch in enumerate(itertools.islice(batches, 40)):
        drawn = batches.curriculum.draw(2, number // 2)
        drawn_numbers.add(drawn)
        for document, n_segments in zip(batch.indices, segments_of(batch).tolist(), strict=True):
            assert n_segments == min(plan.n_segments[document], max(drawn, plan.n_least[document]))
        assert (batch.labels != -100).any(dim=-1).any(dim=-1).all()
    assert drawn_numbers == {1, 2, 3, 4, 5, 6}


def test_every_process_draws_the_same_number(corpus):
    alone = make_batches(corpus, TrainerState(stage=2), task="document")
    pair = [make_batches(corpus, TrainerState(stage=2), rank, 2, task="document") for rank in range(2)]
    plan = alone.documents.plan
    for _ in range(20):
        whole, parts = next(alone), [next(batches) for batches in pair]
        read = dict(zip(whole.indices, segments_of(whole).tolist(), strict=True))
        for part in parts:
            assert dict(zip(part.indices, segments_of(part).tolist(), strict=True)).items() <= read.items()
        assert sum(len(part.indices) for part in parts) == len(read) == 4
    assert len(plan.indices) == N_DOCUMENTS


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_stage_that_begins_begins_at_once_and_as_in_a_run_resumed_there(corpus, n_workers):
    state = TrainerState()
    batches = make_batches(corpus, state, dataloader_num_workers=n_workers)
    before = [next(batches) for _ in range(6)]
    assert len({int(segments_of(batch).max()) for batch in before} - {1, 2, 3}) == 0
    state.step, state.stage = 3, 2
    resumed = make_batches(corpus, TrainerState(step=3, stage=2), dataloader_num_workers=n_workers)
    after = [next(batches) for _ in range(12)]
    assert all(same(one, next(resumed)) for one in after)
    assert max(int(segments_of(batch).max()) for batch in after) > 3


def test_without_a_curriculum_documents_are_read_whole(corpus):
    batches = make_batches(corpus, curriculum=None)
    for batch in itertools.islice(batches, 20):
        n_segments = [batches.documents.plan.n_segments[index] for index in batch.indices]
        assert segments_of(batch).tolist() == n_segments


@pytest.mark.parametrize(("device", "is_pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_pinned_before_they_are_asked_for(corpus, monkeypatch, device, is_pinned):
    loaders = []
    monkeypatch.setattr(module, "DataLoader", lambda *_, **how: loaders.append(how) or [])
    make_batches(corpus, device=device, dataloader_num_workers=1)
    assert [how["pin_memory"] for how in loaders] == [is_pinned]


@pytest.mark.parametrize("n_processes", [0, 2])
def test_the_processes_that_make_batches_end_when_they_are_closed(corpus, n_processes):
    batches = make_batches(corpus, dataloader_num_workers=n_processes)
    # a reference cycle keeps the object alive until the garbage collector runs
    batches.itself = batches
    next(batches)
    assert len(multiprocessing.active_children()) == n_processes
    batches.close()
    assert not multiprocessing.active_children()
