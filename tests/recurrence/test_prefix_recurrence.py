"""The parts of the recurrence equal their formulas, written for one layer, document, head and position at a time."""

import pytest
import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.attention import gated_read
from recurrent_bart.recurrence.prefix_recurrence import build_recurrence
from tiny import RECURRENT, TINY, random_ids

# encoder layers, documents, prefix length, tokens, heads, head width, model width
E, B, P, L, H, K, D = 3, 2, 3, 5, 4, 4, 16


def make_recurrence(**fields):
    """Return a recurrence with random parameters in float64."""
    recurrence = build_recurrence(RecurrentBartConfig(**{**TINY, **RECURRENT, **fields})).double()
    with torch.no_grad():
        for parameter in recurrence.parameters():
            parameter.normal_(0.0, 0.5)
    return recurrence


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dot(one, other):
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def sigmoid(x):
    return 1 / (1 + torch.exp(-torch.as_tensor(x, dtype=torch.float64)))


@torch.no_grad()
def test_a_matrix_has_the_rows_gate_and_strength_of_its_layer_document_and_head():
    recurrence, memory, stream = (
        make_recurrence(associative_memory=True),
        normal(E, B, P + K, D),
        normal(E, B, P + L, D),
    )
    is_token = torch.ones(B, L, dtype=torch.bool)
    is_token[1, 2:] = False
    found = recurrence.matrix(memory, stream, is_token.repeat(E, 1), recurrence.by_layer())
    assert found.values.shape == (E * B, H, K, K)
    for e in range(E):
        for b in range(B):
            row = e * B + b
            for h in range(H):
                # the matrix's rows lie behind the slots' rows; heads lie side by side in each
                for i in range(K):
                    for j in range(K):
                        assert found.values[row, h, i, j] == memory[e, b, P + i, h * K + j]
                assert found.gate[row, h] == recurrence.matrix_gate[e, h]
                for t in range(L):
                    x = dot(stream[e, b, P + t], recurrence.write_strength[e, :, h])
                    strength = sigmoid(x + recurrence.write_strength_bias[e, 0, h]) if is_token[b, t] else 0.0
                    assert found.strength[row, t, h] == pytest.approx(float(strength), abs=1e-12)


@torch.no_grad()
def test_padding_is_neither_written_into_a_matrix_nor_read_from_another_document():
    recurrence = make_recurrence(associative_memory=True)
    memory, stream = normal(E, B, P + K, D), normal(E, B, P + L, D)
    is_token = torch.ones(E * B, L, dtype=torch.bool)
    is_token[1::B, 2:] = False
    key, value = normal(E * B, H, L, K), normal(E * B, H, L, K)
    matrix = recurrence.matrix(memory, stream, is_token, recurrence.by_layer())
    written = matrix.written(key, value)
    # the padded document alone, without its padding
    alone = recurrence.matrix(memory[:, 1:], stream[:, 1:, : P + 2], None, recurrence.by_layer())
    expected = alone.written(key[1::B, :, :2], value[1::B, :, :2])
    torch.testing.assert_close(written[1::B], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(written[0::B], matrix.values[0::B], atol=0.01)


@torch.no_grad()
def test_a_matrix_is_written_token_by_token_by_the_delta_rule_and_read_by_head():
    recurrence = make_recurrence(associative_memory=True)
    matrix = recurrence.matrix(normal(E, B, P + K, D), normal(E, B, P + L, D), None, recurrence.by_layer())
    key, value, query = normal(E * B, H, L, K), normal(E * B, H, L, K), normal(E * B, H, L, K)
    written, read = matrix.written(key, value), matrix.read(query)
    for r in range(E * B):
        for h in range(H):
            one = matrix.values[r, h].clone()
            found = torch.tanh(matrix.gate[r, h]) * (query[r, h, 1] / query[r, h, 1].norm()) @ one
            torch.testing.assert_close(read[r, 1, h], found, rtol=0, atol=1e-12)
            for t in range(L):
                unit = key[r, h, t] / key[r, h, t].norm()
                one += matrix.strength[r, t, h] * torch.outer(unit, value[r, h, t] - unit @ one)
            torch.testing.assert_close(written[r, h], one, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"associative_memory": True}], ids=str)
def test_a_state_moves_towards_the_slots_by_its_gate_and_a_document_without_text_keeps_it(fields):
    recurrence = make_recurrence(**fields)
    n_rows = P + (K if fields else 0)
    memory, slots = normal(E, B, n_rows, D), normal(E, B, P, D)
    written = normal(E * B, H, K, K) if fields else None
    is_read = torch.tensor([[True, False], [True, True], [False, True]])
    found = recurrence.next_state(memory, slots, is_read, recurrence.by_layer(), written)
    for e in range(E):
        for b in range(B):
            if not is_read[e, b]:
                assert torch.equal(found[e, b], memory[e, b])
                continue
            for p in range(P):
                old, new = memory[e, b, p], slots[e, b, p]
                # S(t) = S(t-1) + sigmoid(gate[S(t-1), W]) * (W - S(t-1))
                gate = sigmoid(torch.cat([old, new]) @ recurrence.update_gate[e] + recurrence.update_gate_bias[e, 0])
                torch.testing.assert_close(found[e, b, p], old + gate * (new - old), rtol=0, atol=1e-12)
            for i in range(n_rows - P):
                expected = torch.cat([written[e * B + b, h, i] for h in range(H)])
                assert torch.equal(found[e, b, P + i], expected)


@torch.no_grad()
def test_a_prefix_is_the_projection_of_the_layers_state_with_keys_before_values():
    recurrence, memory = make_recurrence().eval(), normal(E, B, P, D)
    key, value = recurrence.project(memory, recurrence.by_layer(), None)
    assert key.shape == value.shape == (E, B, H, P, K)
    for e in range(E):
        hidden = torch.tanh(memory[e] @ recurrence.projection_in[e] + recurrence.projection_in_bias[e])
        both = hidden @ recurrence.projection_out[e] + recurrence.projection_out_bias[e]
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            torch.testing.assert_close(key[e, :, h], both[:, :, :D][..., part], rtol=0, atol=1e-12)
            torch.testing.assert_close(value[e, :, h], both[:, :, D:][..., part], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("has_projection", [True, False])
def test_dropout_falls_on_keys_and_on_values_of_a_prefix_alike(has_projection):
    recurrence = make_recurrence(hidden_dropout_prob=0.25, prefix_projection=has_projection)
    # many documents, so that shares are sure to 0.02
    memory = normal(E, 200, P, D)

    def own(rows):
        return 2 * rows, 3 * rows

    expected = recurrence.eval().project(memory, recurrence.by_layer(), own)
    found = recurrence.train().project(memory, recurrence.by_layer(), own)
    for part, whole in zip(found, expected, strict=True):
        is_kept = part != 0
        assert 1 - is_kept.double().mean() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(part[is_kept], whole[is_kept] / 0.75, rtol=1e-12, atol=0)
    # keys and values are dropped apart from each other
    both = ((found[0] == 0) & (found[1] == 0)).double().mean()
    assert both == pytest.approx(0.25**2, abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_run_in_training_differs_from_one_in_evaluation_only_by_that_dropout(make_model, rate):
    model, ids = make_model(hidden_dropout_prob=rate, prefix_attention="gated"), random_ids(2, 3, 8)
    expected = model.model.encoder(ids).last_hidden_state
    found = model.train().model.encoder(ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-12) == (rate == 0.0)


@torch.no_grad()
def test_each_head_adds_its_gates_share_of_the_prefix_whose_weights_come_first():
    read, memory_read = normal(B, L, H, K), normal(B, L, H, K)
    weights, memory_weights = normal(B, H, L, L), normal(B, H, L, P)
    gate = normal(B, H)
    values, both = gated_read((read, weights), (memory_read, memory_weights), gate)
    assert both.shape == (B, H, L, P + L)
    for b in range(B):
        for h in range(H):
            share = torch.tanh(gate[b, h])
            torch.testing.assert_close(
                values[b, :, h], read[b, :, h] + share * memory_read[b, :, h], rtol=0, atol=1e-12
            )
            torch.testing.assert_close(both[b, h, :, :P], share * memory_weights[b, h], rtol=0, atol=1e-12)
            assert torch.equal(both[b, h, :, P:], weights[b, h])


@torch.no_grad()
@pytest.mark.parametrize(("layer", "head"), [(0, 1), (2, 3)])
def test_a_gate_opens_the_prefix_of_its_own_layer_and_head(make_model, layer, head):
    model, ids = (
        make_model(prefix_attention="gated", schedule="sequential", attn_implementation="eager"),
        random_ids(2, 2, 8),
    )
    gate = model.model.encoder.recurrence.prefix_gate
    gate.zero_()
    closed = model.model.encoder(ids).last_hidden_state
    gate[layer, head] = 0.7
    output = model.model.encoder(ids, output_attentions=True)
    # the weights of one softmax sum to 1, so the prefix has the share of the gate
    prefix_mass = torch.stack([weights[..., :P].sum(dim=-1).mean(dim=(0, 1, 3)) for weights in output.attentions])
    expected = torch.zeros(E, H, dtype=torch.float64)
    expected[layer, head] = torch.tanh(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(prefix_mass, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(output.last_hidden_state, closed, atol=1e-3)
    model.config.schedule = "wavefront"
    found = model.model.encoder(ids).last_hidden_state
    torch.testing.assert_close(found, output.last_hidden_state, rtol=0, atol=1e-10)
