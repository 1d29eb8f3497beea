"""What a process trains on, batch after batch, in the curriculum's length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch, DocumentOrder, RankBatches
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.curriculum import Curriculum
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.lifecycle.faults import explain_loader_errors
from recurrent_bart.training.lifecycle.interruption import ignore_signals
from recurrent_bart.training.preparation import Documents

# a document by its place in the plan, and how many segments of it are read; None: as many as ever
Reading = tuple[int, int | None]


class TrainingBatches(Iterator[Batch]):
    """Micro-batches of one process, without end.

    Batches are made ahead, by other processes, of as many segments as the stage says; so where a stage ends, those that
    are made are thrown away and the next are made anew.

    Args:
        documents: The documents.
        order: Which of them each step reads.
        run: How they are read.
        environment: Which process this is.
        state: Where the run stands; its step and stage are looked at whenever batches are begun.
    """

    def __init__(
        self,
        documents: Documents,
        order: DocumentOrder,
        run: RunArguments,
        environment: Environment,
        state: TrainerState,
    ):
        self.documents, self.order, self.run, self.state = documents, order, run, state
        self.environment, self.curriculum = environment, run.build_curriculum()
        self.loader = self._begin()

    def __next__(self) -> Batch:
        if self.curriculum and self.stage != self.state.stage:
            self.loader = self._begin()
        with explain_loader_errors():
            return next(self.loader)

    def close(self) -> None:
        """End the processes that make batches.

        They ignore the signal that ends them where a process leaves before its loader: it would wait for them for ever.
        """
        self.loader = iter(())

    def _begin(self) -> Iterator[Batch]:
        self.stage, first_step = self.state.stage, self.state.step
        micro_batches = RankBatches(
            self.order,
            first_step,
            self.environment.rank,
            self.environment.world_size,
            self.run.gradient_accumulation_steps,
        )
        loader: DataLoader[Any] = DataLoader(
            IndexedRows(self.documents),
            batch_sampler=_readings(micro_batches, self.curriculum, first_step, self.stage),
            collate_fn=self.documents.collator,
            num_workers=self.run.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.environment.device.type == "cuda",
            # it draws a number when it starts: from the model's generator, a resumed run would have other dropout
            generator=torch.Generator(),
        )
        return iter(loader)


def _readings(
    micro_batches: RankBatches, curriculum: Curriculum | None, first_step: int, stage: int
) -> Iterator[list[Reading]]:
    # a function: a method's generator would hold on to the loader that holds on to it, and with it its processes
    for number, places in enumerate(micro_batches):
        step = first_step + number // micro_batches.accumulation
        n_segments = curriculum.draw(stage, step) if curriculum else None
        yield [(place, n_segments) for place in places]


@dataclass
class IndexedRows(Dataset[dict[str, Any]]):
    """The documents of a plan, by their place in it."""

    documents: Documents

    def __len__(self) -> int:
        return len(self.documents.plan.indices)

    def __getitem__(self, reading: Reading) -> dict[str, Any]:
        place, n_segments = reading
        plan = self.documents.plan
        row = {**self.documents.corpus[plan.indices[place]], "index": plan.indices[place]}
        if n_segments is None:
            return row
        # without any target a document would be read for nothing
        cut = max(n_segments, plan.n_least[place])
        return row | {"max_n_segments": min(cut, plan.n_segments[place])}
