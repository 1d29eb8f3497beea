"""Number of floating-point operations in a training step, and the peak FLOP/s of a device.

Shape suffixes: B documents, N segments, M segments or targets of all documents, L tokens in a segment, T target length.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.decoder_context import section_starts
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.recurrence.associative_memory import CHUNK
from recurrent_bart.recurrence.bptt import n_segments_with_graph
from recurrent_bart.recurrence.segmentation import align_at_end

# vendors' peak FLOP/s of dense matrix products, in bf16 and in fp32 (without TF32), by a part of the device's name; the
# first match counts
PEAKS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 31e12),
    "L40S": (362e12, 92e12),
    "L40": (181e12, 90e12),
    "L4": (121e12, 30e12),
    "RTX 4090": (165e12, 83e12),
    "RTX 3090": (71e12, 36e12),
}
# long enough for one product that no other process disturbs
MEASURED_SECONDS = 0.2


def peak_flops(device: torch.device, is_bf16: bool) -> float:
    """Return the peak FLOP/s of a device: the vendor's number, or a measurement if the device is not in `PEAKS`."""
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if known is None:
        return _measured_peak(device, dtype)
    return known[0 if is_bf16 else 1]


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of many matrix products; on a CPU with this process's threads."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        product = matrix @ matrix
        # synchronizes with the device
        product[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


@dataclass(frozen=True)
class Arithmetic:
    """Counter of useful floating-point operations: matrix products over real tokens. A multiply-add counts as two.

    Excluded: padding, recomputation by gradient checkpointing, and decoder passes that find an oracle's tokens. Only
    the fraction `trained_share` of the parameters needs weight gradients.
    """

    config: RecurrentBartConfig
    trained_share: float = 1.0

    def training(self, attention_mask_BNL: Tensor, labels: Tensor) -> float:
        """Count the operations of a batch's forward and backward passes; `labels` are `(B, T)` or `(B, N, T)`.

        A backward pass costs one forward pass for the gradients of activations and one for the gradients of weights.
        Segments without an autograd graph, see `bptt.n_segments_with_graph`, have no backward pass.
        """
        lengths_BN = attention_mask_BNL.sum(dim=-1)
        n_read_B1 = (lengths_BN > 0).sum(dim=1, keepdim=True)
        # distance from the document's last segment
        distance_BN = n_read_B1 - 1 - torch.arange(lengths_BN.shape[1])
        is_run_BN, has_graph_BN = lengths_BN > 0, lengths_BN > 0
        if labels.dim() == 2:
            if not self.config.has_state and self.config.decoder_context not in ("section", "all"):
                is_run_BN = distance_BN == 0
            has_graph_BN = distance_BN < _n_with_graph(self.config, lengths_BN)
        with_graph = self.encoder(lengths_BN[is_run_BN & has_graph_BN]) + self._decoder_of(lengths_BN, labels)
        return (2 + self.trained_share) * with_graph + self.encoder(lengths_BN[is_run_BN & ~has_graph_BN])

    def encoder(self, lengths_M: Tensor) -> float:
        """Count the operations of an encoder forward pass over segments with `lengths_M` tokens."""
        config, width = self.config, self.config.d_model
        # float64: sums of squares exceed the exact range of float32
        lengths_M = lengths_M.double()
        n_segments, n_tokens, n_pairs = len(lengths_M), float(lengths_M.sum()), float((lengths_M**2).sum())
        n_prefix = config.pre_seq_len
        n_slots = n_prefix if config.has_state else 0
        n_seen_by_slots = n_slots + (n_prefix if config.recurrence == "layerwise" else 0)
        weights = 8 * width**2 + 4 * width * config.encoder_ffn_dim
        attended = n_pairs + n_prefix * n_tokens + n_slots * (n_segments * n_seen_by_slots + n_tokens)
        layer = weights * (n_tokens + n_segments * n_slots) + 4 * width * attended
        if config.associative_memory:
            n_heads = config.encoder_attention_heads
            n_equations = float((lengths_M // CHUNK * CHUNK**2 + (lengths_M % CHUNK) ** 2).sum())
            # counted per token: the write strength, the read, the value predicted from the key, and the write; and the
            # products of the token with the earlier tokens of its chunk
            layer += 2 * width * (n_tokens * (n_heads + 3 * width // n_heads) + n_equations)
        return config.encoder_layers * layer + n_segments * self._recurrence()

    def _recurrence(self) -> float:
        config, width = self.config, self.config.d_model
        projection = 6 * width * config.prefix_hidden_size if config.prefix_projection else 4 * width**2
        n_states = config.encoder_layers if config.recurrence == "layerwise" else 1
        update = 4 * width**2 * n_states if config.has_state and config.update_gate else 0
        return config.pre_seq_len * (config.encoder_layers * projection + update)

    def decoder(self, n_targets_M: Tensor, n_context_M: Tensor) -> float:
        """Count the operations of a decoder forward pass: `n_targets_M` tokens attend to `n_context_M` positions."""
        config, width = self.config, self.config.d_model
        targets, context = n_targets_M.double(), n_context_M.double()
        # self-attention: q, k, v, out; cross-attention: q, out per target and k, v per context position
        weights = (12 * width**2 + 4 * width * config.decoder_ffn_dim) * targets + 4 * width**2 * context
        layers = config.decoder_layers * (weights + 4 * width * targets * (targets + context))
        return float((layers + 2 * width * config.vocab_size * targets).sum())

    def _decoder_of(self, lengths_BN: Tensor, labels: Tensor) -> float:
        n_targets = (labels != IGNORED).sum(dim=-1)
        n_context_BN = self._context(lengths_BN, n_targets > 0 if labels.dim() == 3 else None)
        if labels.dim() == 3:
            return self.decoder(n_targets[n_targets > 0], n_context_BN[n_targets > 0])
        last_B1 = (lengths_BN > 0).sum(dim=1, keepdim=True) - 1
        return self.decoder(n_targets, n_context_BN.gather(1, last_B1).squeeze(1))

    def _context(self, lengths_BN: Tensor, ends_BN: Tensor | None) -> Tensor:
        """Return the decoder context's length after each segment; `ends_BN` is True where a section ends."""
        n_state = self.config.pre_seq_len if self.config.has_state else 0
        if self.config.decoder_context == "last":
            return lengths_BN + n_state
        segment_N = torch.arange(lengths_BN.shape[1])
        first_BN = torch.zeros_like(lengths_BN)
        if self.config.decoder_context == "section" and ends_BN is not None:
            first_BN = section_starts(ends_BN)[:, :-1]
        if self.config.context_segments != -1:
            first_BN = first_BN.maximum(segment_N - self.config.context_segments + 1)
        if self.config.decoder_context == "memory":
            return lengths_BN + n_state * (1 + segment_N - first_BN)
        n_read_BN = nn.functional.pad(lengths_BN.cumsum(dim=1), (1, 0))
        return n_state + n_read_BN[:, 1:] - n_read_BN.gather(1, first_BN)


def _n_with_graph(config: RecurrentBartConfig, lengths_BN: Tensor) -> int:
    aligned, *_ = align_at_end(lengths_BN.unsqueeze(2), lengths_BN.unsqueeze(2), may_be_empty=True)
    return n_segments_with_graph(config, aligned.squeeze(2) > 0, has_target_segments=False)
