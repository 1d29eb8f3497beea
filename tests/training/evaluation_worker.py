"""Worker of test_evaluation.py, one process per rank: ZeRO-3 steps with and without an evaluation between them."""

import json
import sys

import torch

from recurrent_bart.distributed import gather_objects
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.zero.engine import build_engine, full_state_dict, gathered_for_evaluation
from tiny import random_ids, tiny_model


def build():
    torch.manual_seed(0)
    model = tiny_model(dropout=0.1).train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        # 0, because parameters below the threshold are never partitioned
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    return build_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), None, config)


def train(engine, rank, steps):
    for step in steps:
        torch.manual_seed(10 * step + rank)
        inputs = {"input_ids": random_ids(2, 4, 8), "labels": random_ids(2, 5)}
        loss = engine(**{name: ids.to(engine.device) for name, ids in inputs.items()}).loss
        engine.backward(loss)
        engine.step()


def evaluate(engine, rank):
    """Generate texts whose number and length differ between ranks."""
    torch.manual_seed(5)
    documents = random_ids(2, 3, 8).to(engine.device)
    with gathered_for_evaluation(engine) as model:
        texts = [model.generate(documents, max_new_tokens=4 + rank) for _ in range(1 + rank)]
    # without the last id, which is always the end-of-text id
    return texts[0][:, :4].tolist()


if __name__ == "__main__":
    environment = start_processes(timeout_minutes=2)
    plain, evaluated = build(), build()
    train(plain, environment.rank, range(4))
    train(evaluated, environment.rank, range(2))
    texts = gather_objects(evaluate(evaluated, environment.rank))
    is_training = gather_objects(evaluated.module.training)
    train(evaluated, environment.rank, range(2, 4))
    pairs = full_state_dict(plain), full_state_dict(evaluated)
    sizes = gather_objects([parameter.numel() for parameter in evaluated.module.parameters()])
    if environment.rank == 0:
        differ = [name for name, weight in pairs[0].items() if not torch.equal(weight, pairs[1][name])]
        print(json.dumps({"texts": texts, "is_training": is_training, "differ": differ, "sizes": sizes}))
    sys.exit()
