"""Associative memory: one matrix per attention head, which returns a token's value for its key.

On tasks with key-value pairs, a state without matrices scores like a model that knows the values without their keys
(studies/LOG.md). The delta rule (arXiv 2102.11174, 2406.06484) writes the keys and values of tokens into the matrix.
The queries of tokens read the matrix, as in Infini-attention (arXiv 2404.07143) and ARMT (arXiv 2407.04841).
"""

# Shape suffixes: R = layers * documents, L tokens in a segment, H heads, K head width, B documents, E encoder layers,
# D model width.

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# one triangular system writes this number of tokens
CHUNK = 64


@dataclass(frozen=True)
class Matrix:
    """Matrices of all heads. In one segment, gates scale the values read, and strengths scale the values written."""

    # (R, H, K, K); the third axis counts the dimensions of keys, the last axis the dimensions of values
    values: Tensor
    # gate on the read values, (R, H); initialized to `matrix_gate_init`
    gate: Tensor
    # write strength of each token, from 0 to 1, (R, L, H); 0 at padding
    strength: Tensor

    def read(self, query_RHLK: Tensor) -> Tensor:
        """Return the values that token queries read from the matrices, scaled by the gates, `(R, L, H, K)`."""
        unit = nn.functional.normalize(query_RHLK, dim=-1)
        found_RLHK = (unit @ self.values.to(unit.dtype)).transpose(1, 2)
        return torch.tanh(self.gate)[:, None, :, None] * found_RLHK

    def written(self, key_RHLK: Tensor, value_RHLK: Tensor) -> Tensor:
        """Return the matrices after the segment's tokens are written into them.

        Each token moves the value stored at the token's key towards the token's own value; the write strength is the
        size of this step. The result is computed in float32 or float64. Keys have length 1, so matrices stay bounded.
        """
        with torch.autocast(key_RHLK.device.type, enabled=False):
            precise = torch.promote_types(self.values.dtype, torch.float32)
            values = self.values.to(precise)
            unit = nn.functional.normalize(key_RHLK.to(precise), dim=-1)
            strength_RHL1 = self.strength.to(precise).transpose(1, 2).unsqueeze(-1)
            parts = (part.split(CHUNK, dim=2) for part in (unit, value_RHLK.to(precise), strength_RHL1))
            for key, value, strength in zip(*parts, strict=True):
                strong = strength * key
                # each token reads the changes that earlier tokens made
                before = torch.tril(strong @ key.mT, diagonal=-1)
                change = torch.linalg.solve_triangular(
                    before, strength * value - strong @ values, upper=False, unitriangular=True
                )
                values = values + key.mT @ change
            return values.to(self.values.dtype)


def as_rows(values_RHKK: Tensor, n_layers: int) -> Tensor:
    """Reshape matrices into state rows, `(E, B, K, D)`."""
    return values_RHKK.unflatten(0, (n_layers, -1)).transpose(2, 3).flatten(3)


def from_rows(rows_EBKD: Tensor) -> Tensor:
    """Reshape state rows back into matrices; the inverse of `as_rows`."""
    return rows_EBKD.unflatten(3, (-1, rows_EBKD.shape[2])).transpose(2, 3).flatten(0, 1)
