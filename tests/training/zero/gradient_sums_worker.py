"""Worker of test_gradient_sums.py, one process per rank: bfloat16 gradients, summed and exchanged."""

import json
import sys
from pathlib import Path

import deepspeed.comm
import torch
from deepspeed.utils import safe_get_full_grad

from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.zero.engine import build_engine, reducing_once
from recurrent_bart.training.zero.gradient_sums import StepGradients
from tiny import BUCKET, random_ids, tiny_model

N_PASSES = 16


def exchange_error(stage, rank):
    """Return the relative error of a step's gradient against the float64 mean over ranks of their sums."""
    torch.manual_seed(0)
    model = tiny_model(init_std=0.1).train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": BUCKET | {"stage": stage},
    }
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = build_engine(model, torch.optim.SGD(model.parameters(), lr=0.0), None, config)
    own, put_back = [], StepGradients._put_back

    def keep_sums(gradients):
        own.extend(total.double() for total in gradients.sums)
        put_back(gradients)

    StepGradients._put_back = keep_sums
    torch.manual_seed(1 + rank)
    with reducing_once(engine):
        for _ in range(N_PASSES):
            engine.backward(engine(random_ids(1, 2, 4), labels=random_ids(1, 3), return_logits=False).loss)
    StepGradients._put_back = put_back
    found = torch.cat([safe_get_full_grad(p).double().flatten() for p in engine.module.parameters()])
    expected = torch.cat([total.flatten() for total in own])
    torch.distributed.all_reduce(expected)
    expected /= torch.distributed.get_world_size()
    engine.step()
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    environment = start_processes(timeout_minutes=3)
    errors = {stage: exchange_error(stage, environment.rank) for stage in (1, 2, 3)}
    if environment.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(errors))
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
