"""Benchmarked models. All have random weights and equal width, depth and vocabulary.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    PreTrainedModel,
)

from recurrent_bart.benchmarks.models.arithmetic import Attention, PeerArithmetic
from recurrent_bart.benchmarks.models.cases import GRAPHED_MODELS, Case
from recurrent_bart.benchmarks.models.fused_decoder import decoder_loss, encode_segments
from recurrent_bart.benchmarks.models.rmt import RecurrentMemoryBart
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.model.flops import Arithmetic
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.training.model_building import SIZES
from recurrent_bart.training.windows import count_windows, window_losses

# Vocabulary size of BART, and of tiny models on a CPU, whose cost BART's vocabulary would dominate.
VOCAB_SIZE, TINY_VOCAB_SIZE = 50_265, 4_096
# values of the published models LED and LongT5
LED_POSITIONS, LONGT5_RADIUS, LONGT5_BLOCK = 16_384, 127, 16


class BenchmarkModel(Protocol):
    """Interface of a benchmarked model."""

    @property
    def model(self) -> nn.Module:
        """PyTorch module with all parameters."""

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Yield one loss per backward pass. A batch may need several backward passes."""

    def encode(self, batch: Batch) -> Any:
        """Run the encoder on the documents of a batch."""

    def training_flops(self, batch: Batch) -> float:
        """Return the useful FLOPs of a batch's forward and backward passes."""

    def encoder_flops(self, batch: Batch) -> float:
        """Return the useful FLOPs of encoding a batch."""


@dataclass(frozen=True)
class BenchmarkSetting:
    """Settings that all models share: size (one of `SIZES`), tokens in a segment, device and type of weights."""

    model_size: str
    segment_size: int
    device: torch.device
    dtype: torch.dtype

    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return TINY_VOCAB_SIZE if self.model_size == "tiny" else VOCAB_SIZE

    def shape(self) -> dict[str, Any]:
        """Return the fields of a BART configuration that set the model's size."""
        fields = {name: value for name, value in SIZES[self.model_size].items() if name != "segment_size"}
        return fields | {"vocab_size": self.vocab_size()}


def build_benchmark_model(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    """Build the model of a case.

    Raises:
        ValueError: The model does not support a setting of the case.
    """
    is_of_ours = case.checkpointing == "segment" or case.task != "document"
    if case.model != "ours" and (is_of_ours or case.decoder_context != "last" or not case.has_state):
        raise ValueError(f"{case.label()}: only the model ours supports this setting")
    if case.graphed:
        check_graphed(case, setting.device)
    with setting.device:
        subject = BUILDERS[case.model](case, setting)
    subject.model.to(setting.dtype).train(case.work in ("training", "passes"))
    return subject


def check_graphed(case: Case, device: torch.device) -> None:
    """Raise a ValueError if the steps of a case cannot be captured as one CUDA graph."""
    if case.model not in GRAPHED_MODELS or case.work == "generation":
        allowed = ", ".join(GRAPHED_MODELS)
        raise ValueError(f"{case.label()}: graphed is allowed for training and inference of {allowed}")
    if case.checkpointing != "none":
        # checkpointing saves the state of the random number generator, which a capture does not allow
        raise ValueError(f"{case.label()}: graphed needs checkpointing='none'")
    if device.type != "cuda":
        raise ValueError(f"{case.label()}: CUDA graphs need a GPU, but the device is {device}")


@dataclass
class Ours:
    """Recurrent BART, with the same forward and backward passes as in training."""

    model: RecurrentBartForConditionalGeneration
    device: torch.device

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the loss of each truncated-BPTT window (segments that share one backward pass)."""
        config = self.model.config
        return window_losses(
            self.model, config, batch, self.device, count_windows(batch, config), float(batch.n_targets())
        )

    def encode(self, batch: Batch) -> Any:
        """Return the encoder output for the decoder."""
        return self.model.model.encode(batch.input_ids.to(self.device))

    def training_flops(self, batch: Batch) -> float:
        """Return the FLOPs of a batch, as training reports them."""
        return Arithmetic(self.model.config).training(batch.attention_mask, batch.labels)

    def encoder_flops(self, batch: Batch) -> float:
        """Return the encoder's FLOPs for all segments."""
        return Arithmetic(self.model.config).encoder(batch.attention_mask.sum(dim=-1).flatten())


@dataclass
class Recurrent:
    """The Recurrent Memory Transformer."""

    model: RecurrentMemoryBart
    device: torch.device

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Yield losses, each of one target of every document."""
        yield self.model(batch.input_ids.to(self.device), batch.labels.to(self.device))

    def encode(self, batch: Batch) -> Any:
        """Run the encoder on one segment after the other."""
        return self.model.encode(batch.input_ids.to(self.device))

    def training_flops(self, batch: Batch) -> float:
        """Return the FLOPs. Only the last `bptt_depth + 1` segments have a backward pass."""
        n_documents, n_segments, n_tokens = batch.input_ids.shape
        depth = self.model.bptt_depth
        n_with_graph = n_segments if depth == -1 else min(n_segments, depth + 1)
        n_read = n_tokens + len(self.model.memory)
        decoder = self._arithmetic().decoder(batch.labels.shape[-1], n_read)
        segments = 3 * n_with_graph + (n_segments - n_with_graph)
        return n_documents * (segments * self._arithmetic().encoder(n_read) + 3 * decoder)

    def encoder_flops(self, batch: Batch) -> float:
        """Return the encoder's FLOPs for all segments. Each segment includes the memory positions."""
        n_documents, n_segments, n_tokens = batch.input_ids.shape
        return n_documents * n_segments * self._arithmetic().encoder(n_tokens + len(self.model.memory))

    def _arithmetic(self) -> PeerArithmetic:
        return PeerArithmetic(self.model.bart.config, Attention())


@dataclass
class FusedBart:
    """Hugging Face's BART, whose decoder attends to all tokens.

    With `is_whole`, the encoder reads each document as one sequence. Otherwise it reads segments as a batch (SegEnc).
    """

    model: BartForConditionalGeneration
    device: torch.device
    is_whole: bool

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the loss of one target per document."""
        yield decoder_loss(self.model, self.encode(batch), batch.labels.to(self.device))

    def encode(self, batch: Batch) -> Any:
        """Return the encoder output of all tokens."""
        return encode_segments(self.model, self._rows(batch).to(self.device))

    def training_flops(self, batch: Batch) -> float:
        """Return the FLOPs. The backward pass costs twice the forward pass."""
        decoder = self._arithmetic().decoder(batch.labels.shape[-1], batch.input_ids[0].numel())
        return 3 * (self.encoder_flops(batch) + len(batch.labels) * decoder)

    def encoder_flops(self, batch: Batch) -> float:
        """Return the encoder's FLOPs for all rows."""
        n_documents, n_rows, n_tokens = self._rows(batch).shape
        return n_documents * n_rows * self._arithmetic().encoder(n_tokens)

    def _rows(self, batch: Batch) -> Tensor:
        return batch.input_ids.flatten(1).unsqueeze(1) if self.is_whole else batch.input_ids

    def _arithmetic(self) -> PeerArithmetic:
        return PeerArithmetic(self.model.config, Attention())


@dataclass
class WholeDocument:
    """Model that reads a document as one sequence."""

    model: PreTrainedModel
    device: torch.device
    arithmetic: PeerArithmetic
    sees_first_token: bool = False

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the loss of one target per document."""
        labels = batch.labels.to(self.device)
        yield self.model(**self._inputs(batch), labels=labels, use_cache=False).loss

    def encode(self, batch: Batch) -> Any:
        """Run the encoder on whole documents."""
        return self.model.get_encoder()(**self._inputs(batch))

    def training_flops(self, batch: Batch) -> float:
        """Return the FLOPs. The backward pass costs twice the forward pass."""
        n_tokens = batch.input_ids[0].numel()
        decoder = self.arithmetic.decoder(batch.labels.shape[-1], n_tokens)
        return 3 * (self.encoder_flops(batch) + len(batch.labels) * decoder)

    def encoder_flops(self, batch: Batch) -> float:
        """Return the encoder's FLOPs for all documents."""
        return len(batch.input_ids) * self.arithmetic.encoder(batch.input_ids[0].numel())

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.input_ids.flatten(1).to(self.device)
        if not self.sees_first_token:
            return {"input_ids": ids}
        mask = torch.zeros_like(ids)
        mask[:, 0] = 1
        return {"input_ids": ids, "global_attention_mask": mask}


def _ours(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    config = RecurrentBartConfig(
        **setting.shape(),
        **({} if case.has_state else {"pre_seq_len": 0}),
        segment_size=setting.segment_size,
        bptt_depth=case.bptt_depth,
        schedule=case.schedule,
        decoder_context=case.decoder_context,
    )
    model = RecurrentBartForConditionalGeneration(config)
    model.set_gradient_checkpointing(case.checkpointing)
    return Ours(model, setting.device)


def _rmt(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    """Build RMT. The number of memory positions is `pre_seq_len`, the state length of Recurrent BART."""
    model = RecurrentMemoryBart(BartConfig(**setting.shape()), RecurrentBartConfig().pre_seq_len, case.bptt_depth)
    if case.checkpointing == "layer":
        recompute_layers(model.bart)
    return Recurrent(model, setting.device)


def _segenc(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    """Build BART with its own position table, which needs room for one segment."""
    return _fused(case, setting, max(1024, setting.segment_size), is_whole=False)


def _bart(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    """Build BART. Documents longer than 1,024 tokens get a longer position table."""
    return _fused(case, setting, max(1024, case.n_segments * setting.segment_size), is_whole=True)


def _fused(case: Case, setting: BenchmarkSetting, n_positions: int, is_whole: bool) -> BenchmarkModel:
    model = BartForConditionalGeneration(BartConfig(**setting.shape(), max_position_embeddings=n_positions))
    if case.checkpointing == "layer":
        recompute_layers(model)
    return FusedBart(model, setting.device, is_whole)


def _led(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    """Build LED. Attention windows have two segments (published: 1,024 tokens). The first token is global."""
    shape, window = setting.shape(), 2 * setting.segment_size
    config = LEDConfig(
        **shape,
        attention_window=[window] * shape["encoder_layers"],
        max_encoder_position_embeddings=max(LED_POSITIONS, case.n_segments * setting.segment_size),
    )
    model = LEDForConditionalGeneration(config)
    if case.checkpointing == "layer":
        recompute_layers(model)
    arithmetic = PeerArithmetic(RecurrentBartConfig(**shape), Attention(n_near=window + 1, n_for_all=1))
    return WholeDocument(model, setting.device, arithmetic, sees_first_token=True)


def _longt5(case: Case, setting: BenchmarkSetting) -> BenchmarkModel:
    """Build LongT5 with transient-global attention. `d_ff` makes the feed-forward blocks as large as BART's."""
    shape = setting.shape()
    # a multiple of 64, as in published models
    inner = -(-2 * shape["encoder_ffn_dim"] // 3 // 64) * 64
    config = LongT5Config(
        vocab_size=shape["vocab_size"],
        d_model=shape["d_model"],
        d_kv=shape["d_model"] // shape["encoder_attention_heads"],
        d_ff=inner,
        num_heads=shape["encoder_attention_heads"],
        num_layers=shape["encoder_layers"],
        num_decoder_layers=shape["decoder_layers"],
        feed_forward_proj="gated-gelu",
        encoder_attention_type="transient-global",
        local_radius=LONGT5_RADIUS,
        global_block_size=LONGT5_BLOCK,
        decoder_start_token_id=0,
    )
    model = LongT5ForConditionalGeneration(config)
    if case.checkpointing == "layer":
        recompute_layers(model)
    seen = Attention(n_near=2 * LONGT5_RADIUS + 1, n_per_summary=LONGT5_BLOCK)
    widths = {"encoder_ffn_dim": 3 * inner // 2, "decoder_ffn_dim": 3 * inner // 2}
    return WholeDocument(model, setting.device, PeerArithmetic(RecurrentBartConfig(**shape | widths), seen))


def recompute_layers(model: PreTrainedModel) -> None:
    """Enable Hugging Face's activation checkpointing. Newer versions have a new name for the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


BUILDERS: dict[str, Callable[[Case, BenchmarkSetting], BenchmarkModel]] = {
    "ours": _ours,
    "rmt": _rmt,
    "segenc": _segenc,
    "bart": _bart,
    "led": _led,
    "longt5": _longt5,
}
