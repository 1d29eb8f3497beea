"""Started by test_zero.py, one process a rank: optimizer steps under ZeRO, their losses, gradients and weights."""

import json
import sys

import deepspeed.comm
import torch
from deepspeed.utils import safe_get_full_grad

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import gather_objects
from recurrent_bart.model import decoder_context
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.trainer import Trainer
from recurrent_bart.training.zero.engine import build_engine, full_state_dict
from recurrent_bart.training.zero.gradient_buckets import average_and_scatter, keep_partitions
from tiny import tiny_model

N_STEPS, N_DOCUMENTS, N_SEGMENTS, LENGTH = 3, 4, 5, 8
RATE, CLIP = 0.5, 0.7
# step, counted from 0, in which the last process's loss is not finite
SPOILT = 1
# contexts of sections are packed wherever they differ, by one process into more groups than by another
decoder_context.LEAST_SAVING = 0


def make_batches(task):
    """Per step, documents with ragged segments and targets; the same on every process."""
    random = torch.Generator().manual_seed(3)
    for _ in range(N_STEPS):
        mask = torch.ones(N_DOCUMENTS, N_SEGMENTS, LENGTH, dtype=torch.long)
        for row, n_segments in enumerate(torch.randperm(N_SEGMENTS, generator=random)[:N_DOCUMENTS].tolist()):
            mask[row, n_segments + 1 :] = 0
        labels = torch.randint(4, 60, (N_DOCUMENTS, N_SEGMENTS, 6), generator=random)
        labels[torch.rand(labels.shape, generator=random) < 0.3] = -100
        # sections of several segments
        labels[torch.rand(labels.shape[:2], generator=random) < 0.4] = -100
        labels[:, 0, 0] = 5
        labels[~mask.bool().any(-1)] = -100
        ids = torch.randint(4, 60, mask.shape, generator=random)
        yield Batch(ids, mask, labels[:, 0] if task == "document" else labels, indices=[])


def own_part(batch, rank, world_size, accumulation, uneven):
    """This rank's micro-batches, cut to their own number of segments, so that ranks differ in it.

    Uneven ones differ in the number of documents too: of two, the first has the longest alone.
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
    # weights of a size at which float32 itself is good to 1e-5
    model = tiny_model(**case["fields"] | {"init_std": 0.15}).train()
    model.set_gradient_checkpointing(case["checkpointing"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not case["frozen"] or "recurrence." in name)
    # without weight decay and momentum an error in a gradient is an error in a weight
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def trained_parameters(model):
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def reduce_as_deepspeed_too(optimizer, have_same_bits):
    """Of each bucket that ZeRO-3 reduces, note whether DeepSpeed's own code gives the same bits."""
    name = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    ours, theirs = getattr(optimizer, name), getattr(type(optimizer), name)
    assert (ours.func, optimizer.partition_grads.func) == (average_and_scatter, keep_partitions)

    def reduce(parameters, dtype):
        found = ours(parameters, dtype)
        for part, expected in zip(found, theirs(optimizer, parameters, dtype), strict=True):
            # a spoilt step's are not numbers, which are never equal
            whole, rest = part.view(torch.int32).split([len(expected), len(part) - len(expected)])
            have_same_bits.append(torch.equal(whole, expected.view(torch.int32)) and not rest.any())
        return found

    setattr(optimizer, name, reduce)


def run_case(case, environment):
    """Under ZeRO, through the trainer's own step."""
    model, optimizer = build(case)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": case["stage"],
            "reduce_bucket_size": case["bucket"],
            # 0: a tiny model's parameters would else never be gathered
            **({"stage3_param_persistence_threshold": 0} if case["stage"] == 3 else {}),
        },
    }
    engine = build_engine(model, optimizer, None, config)
    have_same_bits = []
    if case["stage"] == 3:
        reduce_as_deepspeed_too(engine.optimizer, have_same_bits)
    run = RunArguments(gradient_accumulation_steps=case["accumulation"])
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
    """The same in plain PyTorch, one process, all documents in one pass."""
    model, optimizer = build(case)
    losses, norms, gradients = [], [], []
    for number, batch in enumerate(make_batches(case["task"])):
        if case["spoilt"] and number == SPOILT:
            continue
        loss = model(**batch.model_inputs(torch.device("cpu"))).loss
        loss.backward()
        for _, parameter in trained_parameters(model):
            # under ZeRO also one that nothing reads has a gradient
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
