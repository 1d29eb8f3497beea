"""A matrix of each head beside the slots, which gives back a token's value for its key.

Where pairs are to be carried, slots alone gave what values without their keys give (studies/LOG.md). The matrix is
written with the tokens' own keys and values, token by token by the delta rule (arXiv 2102.11174, 2406.06484), and read
with their queries, as in Infini-attention (arXiv 2404.07143) and ARMT (arXiv 2407.04841).

Shape suffixes: R = layers * documents, L tokens in a segment, H heads, K head width, B documents, E encoder layers,
D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# tokens written at once, by one system of as many equations
CHUNK = 64


@dataclass(frozen=True)
class Matrix:
    """What was written of each head, and how the segment at hand reads and writes it.

    Attributes:
        values: `(R, H, K, K)`, a row for each number of a key.
        gate: Of each head on what is read, `(R, H)`; it begins with `matrix_gate_init`.
        strength: Of each token's writing, between 0 and 1, `(R, L, H)`; 0 at padding.
    """

    values: Tensor
    gate: Tensor
    strength: Tensor

    def read(self, query_RHLK: Tensor) -> Tensor:
        """What tokens read, behind the gate, `(R, L, H, K)`."""
        unit = nn.functional.normalize(query_RHLK, dim=-1)
        found_RLHK = (unit @ self.values.to(unit.dtype)).transpose(1, 2)
        return torch.tanh(self.gate)[:, None, :, None] * found_RLHK

    def written(self, key_RHLK: Tensor, value_RHLK: Tensor) -> Tensor:
        """The values after the segment: token by token, what a key gives goes towards its value by the strength.

        Computed in float32 at least. Keys have length one, so nothing grows, however many tokens there are.
        """
        with torch.autocast(key_RHLK.device.type, enabled=False):
            precise = torch.promote_types(self.values.dtype, torch.float32)
            values = self.values.to(precise)
            unit = nn.functional.normalize(key_RHLK.to(precise), dim=-1)
            strength_RHL1 = self.strength.to(precise).transpose(1, 2).unsqueeze(-1)
            parts = (part.split(CHUNK, dim=2) for part in (unit, value_RHLK.to(precise), strength_RHL1))
            for key, value, strength in zip(*parts, strict=True):
                strong = strength * key
                # each token finds what those before it have changed
                before = torch.tril(strong @ key.mT, diagonal=-1)
                change = torch.linalg.solve_triangular(
                    before, strength * value - strong @ values, upper=False, unitriangular=True
                )
                values = values + key.mT @ change
            return values.to(self.values.dtype)


def as_rows(values_RHKK: Tensor, n_layers: int) -> Tensor:
    """Matrices as rows of a state, `(E, B, K, D)`."""
    return values_RHKK.unflatten(0, (n_layers, -1)).transpose(2, 3).flatten(3)


def from_rows(rows_EBKD: Tensor) -> Tensor:
    """What `as_rows` was given."""
    return rows_EBKD.unflatten(3, (-1, rows_EBKD.shape[2])).transpose(2, 3).flatten(0, 1)
