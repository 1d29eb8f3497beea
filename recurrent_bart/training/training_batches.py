"""Training batches of a rank, with documents shortened as the curriculum requires."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch, DocumentOrder, RankBatches
from recurrent_bart.training.curriculum import Curriculum
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.lifecycle.faults import explain_loader_errors
from recurrent_bart.training.lifecycle.interruption import ignore_signals
from recurrent_bart.training.preparation import Documents
from recurrent_bart.training.run_arguments import RunArguments

# index of a document in the plan, number of segments to read from the document (None: no curriculum), and step
Reading = tuple[int, int | None, int]


class TrainingBatches(Iterator[Batch]):
    """Endless iterator of one rank's micro-batches.

    Worker processes prepare batches for the current stage of the curriculum. When a stage ends, prepared batches are
    discarded. The step and stage of `state` are read whenever a loader starts.
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
        """End the worker processes.

        The workers ignore signals. If this process exited with a running loader, the process would wait for the workers
        forever.
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
            IndexedRows(self.documents, self.run.seed),
            batch_sampler=_readings(micro_batches, self.curriculum, first_step, self.stage),
            collate_fn=self.documents.collator,
            num_workers=self.run.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.environment.device.type == "cuda",
            # a loader draws a seed when it starts; a draw from the default generator would change the dropout of a
            # resumed run
            generator=torch.Generator(),
        )
        return iter(loader)


def _readings(
    micro_batches: RankBatches, curriculum: Curriculum | None, first_step: int, stage: int
) -> Iterator[list[Reading]]:
    # a function and not a method: a reference cycle between generator and loader would keep the workers alive
    for number, indices in enumerate(micro_batches):
        step = first_step + number // micro_batches.accumulation
        n_segments = curriculum.draw(stage, step) if curriculum else None
        yield [(index, n_segments, step) for index in indices]


@dataclass
class IndexedRows(Dataset[dict[str, Any]]):
    """Data set of the documents of a `DocumentPlan`; item `i` is the document `plan.indices[i]`."""

    documents: Documents
    seed: int

    def __len__(self) -> int:
        return len(self.documents.plan.indices)

    def __getitem__(self, reading: Reading) -> dict[str, Any]:
        index, n_segments, step = reading
        plan = self.documents.plan
        row = {**self.documents.corpus[plan.indices[index]], "index": plan.indices[index]}
        # the noise of a pretraining task changes with the step
        row["drawn_at"] = f"{self.seed} {step}"
        if n_segments is None:
            return row
        # read at least up to the first target, because a document without a target gives no gradient
        cut = max(n_segments, plan.n_least[index])
        return row | {"max_n_segments": min(cut, plan.n_segments[index])}
