"""Naive reference of the grid: one document, no padding, no batch.

All fast paths are compared with it. Shapes: P slots, L tokens, D model width.
"""

import torch
from torch.nn.functional import layer_norm, linear


def encode(model, segments, cuts=(), states=None):
    """Read one document's segments, lists of ids.

    Args:
        model: The model.
        segments: Segments of the document.
        cuts: Indices of segments before which all states are detached.
        states: State before the first segment, `(E, P, D)`, without an associative memory; None: the learned one.

    Returns:
        The last layer's state `(P, D)` and token stream `(L, D)` after each segment; and the final state of all layers,
        with the rows of an associative memory.
    """
    encoder, config = model.model.encoder, model.config
    core = encoder.recurrence
    states = list(core.initial_memory if states is None else states) if core else []
    n_heads = config.encoder_attention_heads
    width = config.d_model // n_heads
    matrices = torch.zeros(len(encoder.layers), n_heads, width, width, dtype=encoder.embed_tokens.weight.dtype)
    matrices = list(matrices) if config.associative_memory else []
    after = []
    for number, ids in enumerate(segments):
        if number in cuts and config.has_state:
            states, matrices = ([part.detach() for part in parts] for parts in (states, matrices))
        tokens = encoder.embed_tokens(torch.tensor([ids]))[0] + encoder.embed_positions(torch.tensor([ids]))[0]
        tokens = encoder.layernorm_embedding(tokens)
        slots = tokens[:0]
        if config.has_state:
            slots = encoder.layernorm_embedding(states[0] if config.recurrence == "top" else core.slot_embedding)
        for e, layer in enumerate(encoder.layers):
            read = before(layer, slots) if config.recurrence == "top" else states[e] if core else None
            prefix = project(core, layer, read, e, config) if core else None
            matrix = matrices[e] if matrices else None
            if matrices:
                matrices[e] = written(layer.self_attn, before(layer, tokens), matrix, core, e)
            tokens, slots = cell(layer, tokens, slots, prefix, core, e, config, matrix)
            if config.has_state and config.recurrence == "layerwise":
                states[e] = update(core, states[e], read_above(encoder, e, slots), e, config)
        if config.recurrence == "top" and core:
            states[0] = update(core, states[0], read_above(encoder, -1, slots), 0, config)
        top = read_above(encoder, -1, tokens)
        after.append((states[-1] if config.has_state else top[:0], top))
    if matrices:
        # row i holds the i-th key dimension of all heads
        rows = [matrix.transpose(0, 1).reshape(width, -1) for matrix in matrices]
        states = [torch.cat(both) for both in zip(states, rows, strict=True)]
    return after, states if config.has_state else []


def before(layer, rows):
    """Return rows as the layer's attention reads them."""
    norm = layer.self_attn_layer_norm
    is_normed = layer.self_attn.config.normalize_before
    return layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias) if is_normed else rows


def read_above(encoder, e, rows):
    """Return rows that leave layer e as the layer above, or the decoder, reads them."""
    if encoder.layer_norm is None:
        return rows
    if encoder.layers[e] is encoder.layers[-1]:
        norm = encoder.layer_norm
        return layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias)
    return before(encoder.layers[e + 1], rows)


def context(config, after, t, ends=()):
    """Return the decoder's context after segment t, `(A, D)`; `ends` are the last segments of sections."""
    memory, tokens = after[t]
    most = t + 1 if config.context_segments == -1 else config.context_segments
    begin, first = max((end + 1 for end in ends if end < t), default=0), max(0, t + 1 - most)
    memories, streams = zip(*after[: t + 1], strict=True)
    return {
        "last": lambda: torch.cat([memory, tokens]),
        "memory": lambda: torch.cat([*memories[first:], tokens]),
        "section": lambda: torch.cat([memory, *streams[max(begin, first) :]]),
        "all": lambda: torch.cat([memory, *streams[first:]]),
    }[config.decoder_context]()


def detached_outside(after, first, stop):
    """Return the results of `encode` after each segment, with gradient from segments `first` to `stop` only."""
    numbered = enumerate(after)
    return [pair if first <= t < stop else tuple(part.detach() for part in pair) for t, pair in numbered]


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


def written(attention, tokens, matrix, core, e):
    """Return the matrix of each head after the tokens, written one by one by the delta rule."""
    strength = torch.sigmoid(tokens @ core.write_strength[e] + core.write_strength_bias[e])
    key, value = attention.k_proj(tokens), attention.v_proj(tokens)
    heads = []
    for h, values in enumerate(matrix):
        part = slice(h * len(values), (h + 1) * len(values))
        for t in range(len(tokens)):
            unit = key[t, part] / key[t, part].norm()
            values = values + strength[t, h] * torch.outer(unit, value[t, part] - unit @ values)
        heads.append(values)
    return torch.stack(heads)


def read_matrix(attention, rows, matrix, gate):
    """Return the values that rows read from the matrix."""
    heads = attention.q_proj(rows).unflatten(1, (len(matrix), -1)).transpose(0, 1)
    found = torch.tanh(gate)[:, None, None] * (heads / heads.norm(dim=-1, keepdim=True)) @ matrix
    return found.transpose(0, 1).flatten(1)


def cell(layer, tokens, slots, prefix, core, e, config, matrix=None):
    """Return new tokens and new slots of a layer."""
    attention = layer.self_attn
    own_tokens, own_slots = before(layer, tokens), before(layer, slots)

    def project_both(rows):
        return attention.k_proj(rows), attention.v_proj(rows)

    if prefix is None:
        read = attend(attention, own_tokens, project_both(own_tokens))
        return feed_forward(layer, tokens, read), slots
    if config.prefix_attention == "concat":
        token_read = attend(attention, own_tokens, join(prefix, project_both(own_tokens)))
    else:
        gate = torch.tanh(core.prefix_gate[e])
        token_read = attend(attention, own_tokens, project_both(own_tokens))
        token_read = token_read + attend(attention, own_tokens, prefix, gate)
    if not config.has_state:
        return feed_forward(layer, tokens, token_read), slots
    if matrix is not None:
        token_read = token_read + read_matrix(attention, own_tokens, matrix, core.matrix_gate[e])
    own = join(project_both(own_slots), project_both(own_tokens))
    slot_read = attend(attention, own_slots, own if config.recurrence == "top" else join(prefix, own))
    return feed_forward(layer, tokens, token_read), feed_forward(layer, slots, slot_read)


def join(*parts):
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)


def attend(attention, rows, key_value, gate=None):
    """Return the attention output of rows `(L, D)`, head by head."""
    query, (key, value) = attention.q_proj(rows), key_value
    width = attention.head_dim
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * width, (h + 1) * width)
        weights = torch.softmax(query[:, part] @ key[:, part].T / width**0.5, dim=1)
        heads.append(weights @ value[:, part] * (1 if gate is None else gate[h]))
    return torch.cat(heads, 1)


def feed_forward(layer, rows, read):
    first, last = (
        lambda rows, norm=norm: layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias)
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)
    )
    out = layer.self_attn.out_proj
    rows = rows + linear(read, out.weight, out.bias)
    if layer.self_attn.config.normalize_before:
        return rows + layer.fc2(layer.activation_fn(layer.fc1(last(rows))))
    rows = first(rows)
    return last(rows + layer.fc2(layer.activation_fn(layer.fc1(rows))))
