"""Cost and accuracy of float32 gradient sums on a GPU: `pytest -m gpu -s tests/gpu/test_gradient_sums.py`."""

import math
import statistics
import time

import pytest
import torch

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from recurrent_bart.training.optimization import LearningRates, build_optimizer
from recurrent_bart.training.zero.engine import build_engine, reducing_once
from tiny import random_ids, tiny_model

pytestmark = pytest.mark.gpu

N_PASSES, N_ROUNDS, N_STEPS = 8, 5, 4
# limits relative to a step's time and to a gradient's norm
MOST_TIME, MOST_ERROR = 0.02, 1e-3
stages = pytest.mark.parametrize("stage", [2, 3])


def bart_large():
    """Build an untrained BART-large with the recurrence; a pass reads a window of 2 segments of 512 tokens."""
    config = RecurrentBartConfig(
        **{"vocab_size": 50265, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12},
        **{"encoder_attention_heads": 16, "decoder_attention_heads": 16},
        **{"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "max_position_embeddings": 1024},
        **{"pre_seq_len": 32, "segment_size": 512, "bptt_depth": -1},
    )
    return RecurrentBartForConditionalGeneration(config).train()


def build(model, stage, dtype, bucket=50_000_000):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": dtype},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "overlap_comm": stage == 3,
            "contiguous_gradients": stage == 2,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        },
    }
    return build_engine(model, build_optimizer(model, LearningRates(0.0, 0.0), 0.0), None, config)


def run_passes(engine, batches):
    with reducing_once(engine):
        for ids, labels in batches:
            engine.backward(engine(ids, labels=labels, return_logits=False).loss)


def step_seconds(engine, batches):
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(N_STEPS):
        run_passes(engine, batches)
        engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / N_STEPS


@stages
@pytest.mark.parametrize("n_documents", [1, 4])
def test_sums_in_float32_cost_little_of_a_step(alone, stage, n_documents):
    """Rounds of both dtypes alternate, so that a falling clock rate slows both."""
    batches = [
        (random_ids(n_documents, 2, 512, vocab_size=50265).cuda(), random_ids(n_documents, 64, vocab_size=50265).cuda())
        for _ in range(N_PASSES)
    ]
    engines, peaks = {}, {}
    for dtype in ("bf16", "fp32"):
        torch.manual_seed(0)
        engines[dtype] = build(bart_large(), stage, dtype)
        # compiles kernels and captures CUDA graphs
        step_seconds(engines[dtype], batches)
    seconds = {dtype: [] for dtype in engines}
    for _ in range(N_ROUNDS):
        for dtype, engine in engines.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds[dtype].append(step_seconds(engine, batches))
            peaks[dtype] = torch.cuda.max_memory_allocated() - before
    n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engines["fp32"].module.parameters())
    medians = {dtype: statistics.median(found) for dtype, found in seconds.items()}
    cost = medians["fp32"] / medians["bf16"] - 1
    extra = (peaks["fp32"] - peaks["bf16"]) / n_parameters
    print(
        f"\nZeRO-{stage}, {n_documents} documents a pass: {1e3 * medians['bf16']:.1f} ms in bf16, {cost:+.2%} in fp32"
    )
    print(f"peak memory of a step: {extra:+.2f} bytes a parameter")
    assert cost <= MOST_TIME
    # 4-byte sums replace 2-byte gradients
    assert extra <= 4.1


@stages
@pytest.mark.parametrize("n_passes", [8, 64, 512])
def test_sums_of_many_passes_are_those_of_float32(alone, stage, n_passes):
    engine = build(tiny_model(init_std=0.1).train(), stage, "fp32", bucket=1_000_000)
    documents = [(random_ids(2, 3, 8).cuda(), random_ids(2, 5).cuda()) for _ in range(4)]

    def gradient(batches):
        run_passes(engine, batches)
        parts = [part.flatten().double() for group in engine.optimizer.averaged_gradients.values() for part in group]
        engine.step()
        return torch.cat(parts)

    expected = sum(gradient([document]) for document in documents) * (n_passes // 4)
    difference = gradient(documents * (n_passes // 4)) - expected
    error = float(difference.norm() / expected.norm())
    print(f"\nZeRO-{stage}, {n_passes} passes: relative error {error:.1e}")
    assert math.isfinite(error)
    assert error <= MOST_ERROR
