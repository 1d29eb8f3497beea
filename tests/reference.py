"""The grid of DESIGN section 2 in the shortest code that is right: one document, no padding, no batch.

Everything fast is compared with this. Shapes: P slots, L tokens, D model width.
"""

import torch
from torch.nn.functional import layer_norm, linear


def encode(model, segments):
    """Read one document's segments, lists of ids.

    Returns:
        After each segment, the last layer's state `(P, D)` and token stream `(L, D)`; and all layers' final state.
    """
    encoder, config = model.model.encoder, model.config
    core = encoder.recurrence
    states = list(core.initial_memory) if core else []
    after = []
    for ids in segments:
        tokens = encoder.embed_tokens(torch.tensor([ids]))[0] + encoder.embed_positions(torch.tensor([ids]))[0]
        tokens = encoder.layernorm_embedding(tokens)
        slots = encoder.layernorm_embedding(core.slot_embedding) if core else tokens[:0]
        for e, layer in enumerate(encoder.layers):
            prefix = project(core, layer, states[e], e, config) if core else None
            tokens, slots = cell(layer, tokens, slots, prefix, core, e, config)
            if core:
                states[e] = update(core, states[e], slots, e, config)
        after.append((states[-1] if core else None, tokens))
    return after, states


def project(core, layer, state, e, config):
    if not config.prefix_projection:
        return layer.self_attn.k_proj(state), layer.self_attn.v_proj(state)
    hidden = torch.tanh(state @ core.projection_in[e] + core.projection_in_bias[e])
    both = hidden @ core.projection_out[e] + core.projection_out_bias[e]
    return both[:, : config.d_model], both[:, config.d_model :]


def update(core, state, slots, e, config):
    if not config.update_gate:
        return slots
    gate = torch.sigmoid(torch.cat([state, slots], 1) @ core.update_gate[e] + core.update_gate_bias[e])
    return state + gate * (slots - state)


def cell(layer, tokens, slots, prefix, core, e, config):
    """New tokens and new slots of a layer."""
    attention = layer.self_attn

    def project_both(rows):
        return attention.k_proj(rows), attention.v_proj(rows)

    if prefix is None:
        read = attend(attention, tokens, project_both(tokens))
        return feed_forward(layer, tokens, read), slots
    if config.prefix_attention == "concat":
        token_read = attend(attention, tokens, join(prefix, project_both(tokens)))
    else:
        gate = torch.tanh(core.prefix_gate[e])
        token_read = attend(attention, tokens, project_both(tokens)) + attend(attention, tokens, prefix, gate)
    slot_read = attend(attention, slots, join(prefix, project_both(slots), project_both(tokens)))
    return feed_forward(layer, tokens, token_read), feed_forward(layer, slots, slot_read)


def join(*parts):
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)


def attend(attention, rows, key_value, gate=None):
    """What rows `(L, D)` read, head by head."""
    query, (key, value) = attention.q_proj(rows), key_value
    width = attention.head_dim
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * width, (h + 1) * width)
        weights = torch.softmax(query[:, part] @ key[:, part].T / width**0.5, dim=1)
        heads.append(weights @ value[:, part] * (1 if gate is None else gate[h]))
    return torch.cat(heads, 1)


def feed_forward(layer, rows, read):
    first, last = layer.self_attn_layer_norm, layer.final_layer_norm
    out = layer.self_attn.out_proj
    rows = layer_norm(rows + linear(read, out.weight, out.bias), first.normalized_shape, first.weight, first.bias)
    hidden = layer.fc2(layer.activation_fn(layer.fc1(rows)))
    return layer_norm(rows + hidden, last.normalized_shape, last.weight, last.bias)
