"""Worker of test_module_gathers.py and test_partition_buckets.py: steps with and without our patches."""

import contextlib
import json
import sys
from pathlib import Path
from types import MethodType

import deepspeed.comm
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_grad

from recurrent_bart.checkpointing.checkpoints import Checkpoints, TrainerState
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.zero import deepspeed_patches, module_gathers
from recurrent_bart.training.zero.engine import (
    build_engine,
    full_state_dict,
    gathered_for_evaluation,
    reducing_once,
)
from recurrent_bart.training.zero.partition_buckets import PartitionBuckets
from tiny import BUCKET, random_ids, tiny_model

PATCHES = deepspeed_patches.PATCHES
# purposes of the patches that are compared with DeepSpeed's code
COMPARED = (
    "gather parameters by module",
    "reduce gradients by bucket",
    "update parameter groups as a whole",
    "leave parameters at their weights",
)
N_STEPS = 3


def build(case):
    torch.manual_seed(0)
    model = tiny_model(init_std=0.1, **case["fields"]).train()
    model.set_gradient_checkpointing(case["checkpointing"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not case["frozen"] or "recurrence." in name)
    matrices = [
        [it for it in model.parameters() if it.requires_grad and (it.dim() > 1) is is_matrix]
        for is_matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW([{"params": members} for members in matrices if members], lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": case["bf16"]},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **BUCKET, **case["zero"]},
    }
    return build_engine(model, optimizer, None, config)


def make_batch(engine, n_documents, n_segments):
    ids, labels = random_ids(n_documents, n_segments, 8), random_ids(n_documents, 4)
    return {"input_ids": ids.to(engine.device), "labels": labels.to(engine.device)}


def is_sharded(engine):
    statuses = {getattr(it, "ds_status", None) for it in engine.module.parameters()}
    return statuses == {ZeroParamStatus.NOT_AVAILABLE}


def evaluate(engine, losses):
    with gathered_for_evaluation(engine) as model, torch.no_grad():
        losses.append(float(model(**make_batch(engine, 1, 2)).loss))


def run_steps(case, folder):
    """Return losses, gradients, weights, numbers of gathers, and True where all parameters were sharded."""
    engine = build(case)
    torch.manual_seed(1 + deepspeed.comm.get_rank())
    losses, gradients, gathers, is_sharded_between = [], [], [], []
    for step in range(N_STEPS):
        gathers.append(0)
        with counted_gathers(gathers), reducing_once(engine) if case["n_passes"] > 1 else contextlib.nullcontext():
            for _ in range(case["n_passes"]):
                loss = engine(**make_batch(engine, 2, 3), return_logits=False).loss
                losses.append(float(loss.detach()))
                engine.backward(loss)
                is_sharded_between.append(is_sharded(engine))
        # DeepSpeed does not find the gradients of round-robin partitions that have padding
        is_readable = not case["zero"].get("round_robin_gradients")
        trained = [it for it in engine.module.parameters() if it.requires_grad and is_readable]
        gradients.append([safe_get_full_grad(parameter).cpu().clone() for parameter in trained])
        engine.step()
        is_sharded_between.append(is_sharded(engine))
        if case["evaluates"]:
            evaluate(engine, losses)
        if case["saves"] and step == 1:
            checkpoints = Checkpoints(Path(folder))
            checkpoints.save(engine, TrainerState(step=step))
            checkpoints.wait()
            before = full_state_dict(engine)
            checkpoints.load(engine)
            after = full_state_dict(engine)
            assert all(torch.equal(after[name], before[name]) for name in before)
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": full_state_dict(engine),
        "gathers": gathers,
        "is_sharded": is_sharded_between,
        "has_partition_buckets": isinstance(getattr(engine.optimizer, "setup_buckets", object()), MethodType)
        and isinstance(engine.optimizer.setup_buckets.__self__, PartitionBuckets),
    }


@contextlib.contextmanager
def counted_gathers(counts):
    """Count the collectives that gather parameters by module in the last entry of `counts`."""
    start = module_gathers.Gather.__init__

    def counted(self, *inputs):
        counts[-1] += 1
        start(self, *inputs)

    module_gathers.Gather.__init__ = counted
    try:
        yield
    finally:
        module_gathers.Gather.__init__ = start


if __name__ == "__main__":
    cases, output = json.loads(sys.argv[1]), sys.argv[2]
    environment = start_processes(timeout_minutes=3)
    results = []
    for number, case in enumerate(cases):
        found = []
        for is_patched in (True, False):
            deepspeed_patches.PATCHES = tuple(it for it in PATCHES if is_patched or it.purpose not in COMPARED)
            found.append(run_steps(case, f"{output}-{number}-{is_patched}"))
        results.append(found)
    if environment.rank == 0:
        torch.save(results, output)
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
