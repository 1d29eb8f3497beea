"""Check that the benchmarked models compute correct results on small inputs. It runs before any timing.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig

from recurrent_bart.benchmarks.models.rmt import RecurrentMemoryBart
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

N_SEGMENTS, SEGMENT_SIZE = 5, 8
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
    "dropout": 0.0,
}
# largest allowed relative difference of losses and gradients in float64
TOLERANCE = 1e-8


def find_wrong_results(device: torch.device) -> list[str]:
    """Check "ours" and RMT. Return one text per wrong result."""
    torch.manual_seed(0)
    ids_BNL = torch.randint(4, SHAPE["vocab_size"], (2, N_SEGMENTS, SEGMENT_SIZE), device=device)
    labels_BT = torch.randint(4, SHAPE["vocab_size"], (2, 6), device=device)
    return [*_faults_of_ours(device, ids_BNL, labels_BT), *_faults_of_rmt(device, ids_BNL, labels_BT)]


def _faults_of_ours(device: torch.device, ids_BNL: Tensor, labels_BT: Tensor) -> list[str]:
    """Find schedules and checkpointing that change loss or gradients. Find a state that the loss ignores."""
    config = RecurrentBartConfig(
        **SHAPE, pre_seq_len=3, segment_size=SEGMENT_SIZE, bptt_depth=-1, hidden_dropout_prob=0.0
    )
    with device:
        model = RecurrentBartForConditionalGeneration(config).double().train()
    _open_gates(model)

    def loss(ids_BNL: Tensor) -> Tensor:
        return model(ids_BNL, labels=labels_BT).loss

    faults, reference = [], None
    for schedule, grain in itertools.product(("sequential", "wavefront"), CHECKPOINTING_GRAINS):
        model.config.schedule = schedule
        model.set_gradient_checkpointing(grain)
        found = _loss_and_gradients(model, loss(ids_BNL))
        reference = found if reference is None else reference
        gap = float((found - reference).abs().max() / reference.abs().max())
        # `not <` also catches nan
        if not gap < TOLERANCE:
            faults.append(
                f"ours, {schedule}, {grain} checkpointing: loss or gradients differ by {gap:.1e} from sequential"
            )
    return faults + ([] if _reads_first_segment(loss, ids_BNL) else ["ours: the loss ignores the first segment"])


def _faults_of_rmt(device: torch.device, ids_BNL: Tensor, labels_BT: Tensor) -> list[str]:
    """Find out if the loss ignores the first segment, or if the initial memory has no gradient."""
    with device:
        model = RecurrentMemoryBart(BartConfig(**SHAPE), n_memory=3).double().train()

    def loss(ids_BNL: Tensor) -> Tensor:
        return model(ids_BNL, labels_BT)

    faults = [] if _reads_first_segment(loss, ids_BNL) else ["RMT: the loss ignores the first segment"]
    # The initial memory precedes only the first segment, so its gradient passes through all segments.
    (gradient,) = torch.autograd.grad(loss(ids_BNL), model.memory, allow_unused=True, materialize_grads=True)
    if not gradient.abs().max() > TOLERANCE:
        faults.append("RMT: the initial memory has no gradient")
    return faults


@torch.no_grad()
def _reads_first_segment(loss: Callable[[Tensor], Tensor], ids_BNL: Tensor) -> bool:
    other = ids_BNL.clone()
    other[:, 0] = other[:, 0].flip(-1)
    return bool((loss(ids_BNL) - loss(other)).abs() > TOLERANCE)


@torch.no_grad()
def _open_gates(model: nn.Module) -> None:
    """Set the gates to random values. Their initial value is zero, which hides the state."""
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.normal_()


def _loss_and_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)])
