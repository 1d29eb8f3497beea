"""The matrix returns a token's value for its key, for any writes in between and any chunk size."""

import pytest
import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_encoder import RecurrentBartEncoder
from recurrent_bart.recurrence import associative_memory
from recurrent_bart.recurrence.associative_memory import Matrix, as_rows, from_rows


def tokens(n_tokens, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, 3, n_tokens, 4, dtype=dtype) for _ in range(2)]


def empty(n_tokens, strength, dtype=torch.float64):
    return Matrix(
        torch.zeros(2, 3, 4, 4, dtype=dtype),
        torch.full((2, 3), 20.0, dtype=dtype),
        torch.full((2, n_tokens, 3), strength, dtype=dtype),
    )


def test_what_was_written_last_is_read():
    key, value = tokens(9)
    key[:, :, -1] = key[:, :, 2]
    matrix = empty(9, 1.0)
    written = Matrix(matrix.written(key, value), matrix.gate, matrix.strength)
    found = written.read(key[:, :, 2:3])[:, 0]
    torch.testing.assert_close(found, value[:, :, -1], rtol=0, atol=1e-12)


def test_it_does_not_matter_how_many_tokens_are_written_at_once(monkeypatch):
    key, value = tokens(13)
    found = []
    for chunk in (1, 4, 64):
        monkeypatch.setattr(associative_memory, "CHUNK", chunk)
        found.append(empty(13, 0.7).written(key, value))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


def test_what_is_padding_writes_nothing():
    key, value = tokens(6)
    matrix = empty(6, 0.7)
    matrix.strength[:, 4:] = 0
    assert torch.equal(matrix.written(key, value), empty(4, 0.7).written(key[:, :, :4], value[:, :, :4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_grows_with_the_number_of_tokens(dtype):
    key, value = tokens(3000, dtype=dtype)
    # nearly equal keys: a plain sum over them would be of the order of thousands
    key = key[:, :, :1] + 0.01 * key
    written = empty(3000, 0.9, dtype).written(key, value)
    assert written.dtype == dtype
    assert written.norm(dim=(2, 3)).max() < 20


def test_matrices_are_rows_of_a_state():
    values = torch.randn(3 * 2, 4, 5, 5)
    rows = as_rows(values, n_layers=3)
    assert rows.shape == (3, 2, 5, 20)
    assert torch.equal(from_rows(rows), values)
    # row i holds the i-th key dimension of all heads
    assert torch.equal(rows[1, 0, 2, 5:10], values[2, 1, 2])


@pytest.mark.parametrize(("fields", "expected"), [({}, 0.0), ({"matrix_gate_init": 1.0}, 1.0)])
def test_gates_begin_as_open_as_they_are_asked_to(fields, expected):
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 16, "vocab_size": 20}
    config = RecurrentBartConfig(**sizes, associative_memory=True, **fields)
    gate = RecurrentBartEncoder(config).recurrence.matrix_gate
    assert torch.equal(gate, torch.full((2, 4), expected))
