"""Worker of test_processes.py, one process per rank: losses, gradients and weights of steps under ZeRO."""

import json
import sys

import deepspeed.comm
import torch
from deepspeed.utils import safe_get_full_grad

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import gather_objects
from recurrent_bart.model import decoder_context
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.trainer import Trainer
from recurrent_bart.training.zero import gradient_buckets
from recurrent_bart.training.zero.engine import build_engine, full_state_dict
from recurrent_bart.training.zero.gradient_buckets import PRIVATE, reduce_bucket
from tiny import tiny_model

N_STEPS, N_DOCUMENTS, N_SEGMENTS, LENGTH = 3, 4, 5, 8
RATE, CLIP = 0.5, 0.7
# step, counted from 0, in which the last rank's loss is not finite
SPOILT = 1
# always pack section contexts of different lengths; the ranks then have different numbers of groups
decoder_context.LEAST_SAVING = 0


def make_batches(task):
    """Make documents with ragged segments and targets for each step, equal on every rank."""
    random = torch.Generator().manual_seed(3)
    for _ in range(N_STEPS):
        mask = torch.ones(N_DOCUMENTS, N_SEGMENTS, LENGTH, dtype=torch.long)
        for row, n_segments in enumerate(torch.randperm(N_SEGMENTS, generator=random)[:N_DOCUMENTS].tolist()):
            mask[row, n_segments + 1 :] = 0
        labels = torch.randint(4, 60, (N_DOCUMENTS, N_SEGMENTS, 6), generator=random)
        labels[torch.rand(labels.shape, generator=random) < 0.3] = -100
        # drop some targets, so that sections have several segments
        labels[torch.rand(labels.shape[:2], generator=random) < 0.4] = -100
        labels[:, 0, 0] = 5
        labels[~mask.bool().any(-1)] = -100
        ids = torch.randint(4, 60, mask.shape, generator=random)
        yield Batch(ids, mask, labels[:, 0] if task == "document" else labels, indices=[])


def own_part(batch, rank, world_size, accumulation, uneven):
    """Select this rank's micro-batches and cut them to their longest document, so that the ranks' lengths differ.

    With `uneven`, the number of documents differs too: rank 0 of two has only the longest document.
    """
    by_length = batch.attention_mask.any(-1).sum(-1).argsort(descending=True)
    for micro in range(accumulation):
        rows = slice(rank + micro * world_size, None, world_size * accumulation)
        if uneven:
            rows = by_length[1:] if rank else by_length[:1]
        ids, mask, labels = batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows]
        n_segments = int(mask.bool().any(-1).sum(-1).max())
        labels = labels[:, :n_segments] if labels.dim() == 3 else labels
        yield Batch(ids[:, :n_segments], mask[:, :n_segments], labels, indices=[])


def build(case):
    torch.manual_seed(0)
    # with weights of this size, float32 rounding errors stay below 1e-5
    model = tiny_model(**case["fields"] | {"init_std": 0.15}).train()
    model.set_gradient_checkpointing(case["checkpointing"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not case["frozen"] or "recurrence." in name)
    # without weight decay and momentum, an error in a gradient is visible in a weight
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def trained_parameters(model):
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def reduce_as_deepspeed_too(optimizer, have_same_bits):
    """Record for each bucket that ZeRO-3 reduces whether DeepSpeed's code gives the same bits."""
    name = f"{PRIVATE}reduce_and_partition_ipg_grads"
    ours, theirs = getattr(optimizer, name), getattr(type(optimizer), f"{PRIVATE}avg_scatter_grads")
    assert ours.func is reduce_bucket
    sums = getattr(optimizer, f"{PRIVATE}param_id_to_grad_partition")

    def reduce(optimizer, dtype):
        parameters = list(optimizer.ipg_buckets[dtype].params)
        before = [sums[parameter.ds_id].clone() for parameter in parameters]
        gradients = [parameter.grad.clone() for parameter in parameters]
        # copied, because DeepSpeed reduces the gradient of a bucket with one parameter in place
        partitions = [part.clone() for part in theirs(optimizer, parameters, dtype)] if parameters else []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)
        reduce_bucket(optimizer, dtype)
        for parameter, partition, total in zip(parameters, partitions, before, strict=True):
            expected = partition if optimizer.micro_step_id == 0 else total[: len(partition)] + partition
            # compared as integers, because a spoilt step has NaN, which never equals itself
            found, rest = sums[parameter.ds_id].view(torch.int32).split([len(expected), len(total) - len(expected)])
            have_same_bits.append(torch.equal(found, expected.view(torch.int32)) and not rest.any())

    return reduce


def run_case(case, environment):
    """Run steps under ZeRO through the trainer's `train_step`."""
    model, optimizer = build(case)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": case["stage"],
            "reduce_bucket_size": case["bucket"],
            # 0, because parameters below the threshold are never partitioned
            **({"stage3_param_persistence_threshold": 0} if case["stage"] == 3 else {}),
        },
    }
    engine = build_engine(model, optimizer, None, config)
    have_same_bits = []
    if case["stage"] == 3:
        # `add_to_bucket` and `finish_reduction` call it by this name
        gradient_buckets.reduce_bucket = reduce_as_deepspeed_too(engine.optimizer, have_same_bits)
    run = RunArguments(gradient_accumulation_steps=case["accumulation"]).of_length(50)
    parts = [
        part
        for batch in make_batches(case["task"])
        for part in own_part(batch, environment.rank, environment.world_size, case["accumulation"], case["uneven"])
    ]
    steps, lines, skipped = [], [], []
    update = engine.step

    def step():
        steps.append({name: safe_get_full_grad(p).cpu().clone() for name, p in trained_parameters(engine.module)})
        update()
        if not engine.was_step_applied():
            steps.pop()

    def spoil(module, args, output):
        if trainer.state.step == SPOILT and environment.rank == environment.world_size - 1:
            output.loss = output.loss * float("nan")
        return output

    engine.step = step
    if case["spoilt"]:
        engine.module.register_forward_hook(spoil)
    trainer = Trainer(
        engine,
        iter(parts),
        run,
        TrainerState(),
        on_log=lines.append,
        on_evaluation=lambda: False,
        on_skip=skipped.append,
    )
    for _ in range(N_STEPS):
        trainer.train_step()
        trainer.log()
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "norms": [line["gradient_norm"] for line in lines if "gradient_norm" in line],
        "skipped": gather_objects(skipped),
        "have_same_bits": gather_objects(have_same_bits),
        "gradients": steps,
        "weights": full_state_dict(engine),
    }


def run_alone(case):
    """Run the same steps in plain PyTorch, in one process, with all documents in one pass."""
    model, optimizer = build(case)
    losses, norms, gradients = [], [], []
    for number, batch in enumerate(make_batches(case["task"])):
        if case["spoilt"] and number == SPOILT:
            continue
        loss = model(**batch.model_inputs(torch.device("cpu"))).loss
        loss.backward()
        for _, parameter in trained_parameters(model):
            # under ZeRO, an unused parameter has a gradient too
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append({name: p.grad.clone() for name, p in trained_parameters(model)})
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": model.state_dict()}


if __name__ == "__main__":
    cases, output = json.loads(sys.argv[1]), sys.argv[2]
    environment = start_processes(timeout_minutes=3)
    results = [run_case(case, environment) for case in cases]
    if environment.rank == 0:
        torch.save(
            [{"zero": found, "alone": run_alone(case)} for found, case in zip(results, cases, strict=True)], output
        )
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
