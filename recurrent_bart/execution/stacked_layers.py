"""Several encoder layers with stacked weights; each linear map is one batched matrix product."""

# Slots are the P positions in front of a segment's tokens that write the state. A stream tensor holds hidden states.
# Shape suffixes: B documents, R = layers * documents, L tokens (slots included), P prefix length (= slots), E encoder
# layers, H heads, K head width, D model width.

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.execution.module_settings import different_settings, has_hooks, settings_of
from recurrent_bart.recurrence.grouped_linear import linear
from recurrent_bart.recurrence.prefix_recurrence import KeyValue, Weights, per_layer

LINEAR = {
    "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out_proj": ("self_attn.out_proj",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
}
NORMS = ("self_attn_layer_norm", "final_layer_norm")
# all submodules of a layer that hold parameters
KINDS: dict[str, type[nn.Module]] = {name: nn.Linear for names in LINEAR.values() for name in names}
KINDS |= dict.fromkeys(NORMS, nn.LayerNorm)
PARAMETERS = {f"{name}.{part}" for name in KINDS for part in ("weight", "bias")}


def why_not_stacked(layers: nn.ModuleList, final_norm: nn.Module | None = None) -> str:
    """Return the reason why the layers cannot be stacked, or an empty string if stacking is possible.

    Stacked layers may differ only in the values of their parameters. `final_norm` is the norm after the last layer.
    """
    shapes = [{name: (it.shape, it.dtype, it.device) for name, it in layer.named_parameters()} for layer in layers]
    settings = settings_of(*layers)
    for number, layer in enumerate(layers):
        if any(type(layer.get_submodule(name)) is not kind for name, kind in KINDS.items()):
            return f"encoder layer {number} holds adapters or other parts that cannot be stacked"
        if any(map(has_hooks, layer.modules())):
            return f"encoder layer {number} holds hooks"
        if shapes[number].keys() != PARAMETERS or shapes[number] != shapes[0]:
            return f"encoder layers 0 and {number} differ in the names, shapes, types or devices of their parameters"
        if settings[number] != settings[0]:
            names = different_settings(layers[0], layer)
            return f"encoder layers 0 and {number} differ in {', '.join(names) or 'the order of their parts'}"
    return "" if final_norm is None else _why_different(final_norm, layers[0].self_attn_layer_norm)


def _why_different(final_norm: Any, norm: Any) -> str:
    """Return the reason why a final norm cannot be stacked with the norms of the layers, or an empty string."""
    if type(final_norm) is not nn.LayerNorm or has_hooks(final_norm):
        return "the norm after the last encoder layer holds adapters or hooks"
    own, layers = (
        [it.eps, *((name, part.shape, part.dtype, part.device) for name, part in it.named_parameters())]
        for it in (final_norm, norm)
    )
    return "" if own == layers else "the norm after the last encoder layer differs from the norms of the layers"


def stack_layers(layers: nn.ModuleList, final_norm: nn.Module | None = None) -> dict[str, Tensor]:
    """Copy and stack the layers' weights; gradients flow back to the layers' parameters.

    Weights of linear maps are `(E, in, out)`, views of `(E, out, in)`, so that the gradient has the parameter's memory
    layout. Biases are `(E, 1, out)`. With `final_norm`, the norm after the last layer, `state_norm` holds the norm that
    reads the slots that leave each layer: that of the layer above, or the final norm.
    """
    stacked: dict[str, Tensor] = {}
    for name, parts in LINEAR.items():
        maps: list[Any] = [layer.get_submodule(part) for layer in layers for part in parts]
        weight = torch.stack([module.weight for module in maps])
        stacked[name] = weight.view(len(layers), -1, weight.shape[-1]).mT
        stacked[f"{name}_bias"] = torch.stack([module.bias for module in maps]).view(len(layers), 1, -1)
    norms: dict[str, list[Any]] = {name: [layer.get_submodule(name) for layer in layers] for name in NORMS}
    if final_norm is not None:
        norms["state_norm"] = [*norms["self_attn_layer_norm"][1:], final_norm]
    for name, by_layer in norms.items():
        stacked[name] = torch.stack([norm.weight for norm in by_layer]).unsqueeze(1)
        stacked[f"{name}_bias"] = torch.stack([norm.bias for norm in by_layer]).unsqueeze(1)
    return stacked


class StackedLayers:
    """Several layers as one `CellLayer`, with stacked weights; rows `(R, L, D)` are sorted by layer, then document."""

    def __init__(self, weights: Weights, shared: BartEncoderLayer):
        self.weights, self.shared = weights, shared

    def query_key_value(self, stream_RLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, each `(R, H, L, K)`."""
        both = self._map("query_key_value", stream_RLD)
        query, key, value = both.unflatten(-1, (3, -1, self.shared.self_attn.head_dim)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def key_value(self, state_EBPD: Tensor) -> KeyValue:
        """Project states to keys and values, each `(E, B, P, D)`."""
        columns = slice(state_EBPD.shape[-1], None)
        weight, bias = self.weights["query_key_value"], self.weights["query_key_value_bias"]
        both = linear(state_EBPD.flatten(1, 2), weight, bias[..., columns], columns)
        key, value = both.unflatten(1, state_EBPD.shape[1:3]).chunk(2, dim=-1)
        return key, value

    def out_proj(self, read_RLD: Tensor) -> Tensor:
        """Apply the output projection of attention."""
        return self._map("out_proj", read_RLD)

    def self_attn_layer_norm(self, stream_RLD: Tensor) -> Tensor:
        """Apply the layer norm after attention, with `normalize_before` the one before attention."""
        return self._norm("self_attn_layer_norm", stream_RLD)

    def fc1(self, stream_RLD: Tensor) -> Tensor:
        """Apply the first feed-forward map."""
        return self._map("fc1", stream_RLD)

    def fc2(self, hidden: Tensor) -> Tensor:
        """Apply the second feed-forward map."""
        return self._map("fc2", hidden)

    def final_layer_norm(self, stream_RLD: Tensor) -> Tensor:
        """Apply the layer norm after the feed-forward block, with `normalize_before` the one before the block."""
        return self._norm("final_layer_norm", stream_RLD)

    def state_of(self, slots_EBPD: Tensor) -> Tensor:
        """Return slots that leave the layers as the layers above read them: normed with `normalize_before`."""
        if "state_norm" not in self.weights:
            return slots_EBPD
        return self._norm("state_norm", slots_EBPD.flatten(0, 1)).view_as(slots_EBPD)

    def epsilon(self, name: str) -> float:
        """Return the epsilon of a norm; `state_norm` has that of the norm before attention, see `why_not_stacked`."""
        return getattr(self.shared, "self_attn_layer_norm" if name == "state_norm" else name).eps

    def _map(self, name: str, rows: Tensor) -> Tensor:
        weight, bias = self.weights[name], self.weights[f"{name}_bias"]
        return per_layer(rows.unflatten(0, (len(bias), -1)), weight, bias).flatten(0, 1)

    def _norm(self, name: str, rows_RLD: Tensor) -> Tensor:
        weight, bias = self.weights[name], self.weights[f"{name}_bias"]
        normed = nn.functional.layer_norm(rows_RLD, rows_RLD.shape[-1:], eps=self.epsilon(name))
        by_layer = normed.unflatten(0, (len(weight), -1)).flatten(1, 2)
        return torch.addcmul(bias, by_layer, weight).view_as(rows_RLD)
