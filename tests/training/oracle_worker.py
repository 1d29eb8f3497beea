"""Worker of test_oracle.py, one process per rank: steps with an oracle under ZeRO; target lengths differ by rank."""

import json
import sys

import deepspeed.comm
import torch

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.trainer import Trainer
from recurrent_bart.training.zero.engine import build_engine, full_state_dict
from tiny import tiny_model

N_STEPS, N_SEGMENTS, LENGTH = 3, 4, 8
# target lengths of even rows (rank 0) and of odd rows (rank 1)
TARGET_LENGTHS = 3, 7
RATE = 0.3


def make_batches(task):
    """Make four documents per step, equal on every rank."""
    random = torch.Generator().manual_seed(3)
    for _ in range(N_STEPS):
        ids = torch.randint(4, 60, (4, N_SEGMENTS, LENGTH), generator=random)
        labels = torch.randint(4, 60, (4, N_SEGMENTS, max(TARGET_LENGTHS)), generator=random)
        for parity, length in enumerate(TARGET_LENGTHS):
            labels[parity::2, :, length:] = -100
        # rank 0 has a window without any target
        labels[::2, :2] = -100
        yield Batch(ids, torch.ones_like(ids), labels[:, -1] if task == "document" else labels, indices=[])


def own_part(batch, rank):
    """Select one rank's documents and cut their targets to this rank's longest."""
    rows = slice(rank, None, 2)
    return Batch(
        batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows, ..., : TARGET_LENGTHS[rank]], indices=[]
    )


def build(case):
    torch.manual_seed(0)
    # with weights of this size, float32 rounding errors stay below 1e-5
    model = tiny_model(init_std=0.15, **case["fields"]).train()
    model.set_gradient_checkpointing(case["checkpointing"])
    return model, torch.optim.SGD(model.parameters(), lr=RATE), Oracle(**case["oracle"])


def run_case(case, environment):
    """Run steps under ZeRO through the trainer's `train_step`."""
    model, optimizer, oracle = build(case)
    zero = {"stage": case["stage"], **({"stage3_param_persistence_threshold": 0} if case["stage"] == 3 else {})}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's default is 1
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    engine = build_engine(model, optimizer, None, config)
    parts = [own_part(batch, environment.rank) for batch in make_batches(case["task"])]
    lines = []
    trainer = Trainer(
        engine,
        iter(parts),
        RunArguments().of_length(50),
        TrainerState(),
        on_log=lines.append,
        on_evaluation=lambda: False,
        oracle=lambda step: oracle,
    )
    for _ in range(N_STEPS):
        trainer.train_step()
        trainer.log()
    shares = [line["gold_probability"] for line in lines]
    return {"losses": [line["loss"] for line in lines], "weights": full_state_dict(engine), "shares": shares}


def run_alone(case):
    """Run the same steps in plain PyTorch, in one process, with all documents in one pass."""
    model, optimizer, oracle = build(case)
    losses = []
    for batch in make_batches(case["task"]):
        loss = model(**batch.model_inputs(torch.device("cpu")), oracle=oracle).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": model.state_dict()}


if __name__ == "__main__":
    cases, output = json.loads(sys.argv[1]), sys.argv[2]
    environment = start_processes(timeout_minutes=2)
    results = [run_case(case, environment) for case in cases]
    if environment.rank == 0:
        torch.save(
            [{"zero": found, "alone": run_alone(case)} for found, case in zip(results, cases, strict=True)], output
        )
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
