"""Check that the benchmarked models compute correct results on small inputs. It runs before any timing.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkModel, FusedBart, Recurrent
from recurrent_bart.benchmarks.models.captured import CapturedStep, captured_reading
from recurrent_bart.benchmarks.models.cases import SCHEDULES
from recurrent_bart.benchmarks.models.fused_decoder import decoder_loss, encode_segments
from recurrent_bart.benchmarks.models.rmt import RecurrentMemoryBart
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
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
    """Check "ours", RMT, SegEnc and, on a GPU, CUDA graphs. Return one text per wrong result."""
    torch.manual_seed(0)
    ids_BNL = torch.randint(4, SHAPE["vocab_size"], (2, N_SEGMENTS, SEGMENT_SIZE), device=device)
    labels_BT = torch.randint(4, SHAPE["vocab_size"], (2, 6), device=device)
    checks = [_faults_of_ours, _faults_of_rmt, _faults_of_segenc]
    checks += [find_wrong_graphs] * (device.type == "cuda")
    return [fault for check in checks for fault in check(device, ids_BNL, labels_BT)]


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
        name = f"ours, {schedule}, {grain} checkpointing: loss or gradients"
        faults += _difference(name, found, reference, "sequential")
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


def _faults_of_segenc(device: torch.device, ids_BNL: Tensor, labels_BT: Tensor) -> list[str]:
    """Find schedules of "ours" without a state that differ from SegEnc with the same weights."""
    config = RecurrentBartConfig(
        **SHAPE, pre_seq_len=0, segment_size=SEGMENT_SIZE, bptt_depth=-1, decoder_context="all"
    )
    with device:
        model = RecurrentBartForConditionalGeneration(config).double().train()
        bart = BartForConditionalGeneration(BartConfig(**SHAPE)).double().train()
    bart.load_state_dict(model.state_dict())
    loss = decoder_loss(bart, encode_segments(bart, ids_BNL), labels_BT)
    faults, reference = [], _loss_and_gradients(bart, loss)
    for schedule in SCHEDULES:
        model.config.schedule = schedule
        found = _loss_and_gradients(model, model(ids_BNL, labels=labels_BT).loss)
        faults += _difference(f"ours, {schedule}, no state: loss or gradients", found, reference, "SegEnc")
    return faults


def find_wrong_graphs(device: torch.device, ids_BNL: Tensor, labels_BT: Tensor) -> list[str]:
    """Find models whose CUDA graph gives other encoder outputs, losses or gradients than the same work without it."""
    with device:
        rmt = RecurrentMemoryBart(BartConfig(**SHAPE), n_memory=3).double().train()
        bart = BartForConditionalGeneration(BartConfig(**SHAPE)).double().train()
    subjects: dict[str, BenchmarkModel] = {
        "RMT": Recurrent(rmt, device),
        "SegEnc": FusedBart(bart, device, is_whole=False),
        "BART": FusedBart(bart, device, is_whole=True),
    }
    captured_for, replayed_for = (
        Batch(ids, torch.ones_like(ids), labels_BT, list(range(len(ids)))) for ids in (ids_BNL, ids_BNL.flip(-1))
    )
    faults = []
    for name, subject in subjects.items():
        step = CapturedStep(subject, captured_for, with_optimizer=False)
        reading = captured_reading(subject, captured_for)
        step.passes.batch = reading.batch = replayed_for
        with torch.no_grad():
            faults += _difference(
                f"{name}, CUDA graph: encoder outputs", reading()[0], subject.encode(replayed_for), "no graph"
            )
        (loss,) = subject.losses(replayed_for)
        reference = _loss_and_gradients(subject.model, loss)
        replayed = step().view(1)
        gradients = [torch.zeros_like(it) if it.grad is None else it.grad for _, it in _in_order(subject.model)]
        found = torch.cat([replayed, *(gradient.flatten() for gradient in gradients)])
        faults += _difference(f"{name}, CUDA graph: loss or gradients", found, reference, "no graph")
    return faults


def _difference(name: str, found: Tensor, reference: Tensor, other: str) -> list[str]:
    gap = float((found - reference).abs().max() / reference.abs().max())
    # a comparison with nan is False
    return [] if gap < TOLERANCE else [f"{name} differ by {gap:.1e} from {other}"]


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
    parameters = [parameter for _, parameter in _in_order(model)]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)])


def _in_order(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters by name, in an order that models with equal parameters share."""
    return sorted(model.named_parameters())
