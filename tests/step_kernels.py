"""Inputs, tolerances and devices of tests that compare kernels with plain formulas in double precision."""

import contextlib
import os

import pytest
import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def kernel_device(monkeypatch):
    """Make tensors where kernels run: on the CPU, in Triton's interpreter, or else on a GPU."""
    if IS_INTERPRETED:
        multiply_bfloat16(monkeypatch)
    with torch.device("cpu" if IS_INTERPRETED else "cuda"):
        yield


def multiply_bfloat16(monkeypatch):
    """Let Triton's interpreter multiply bfloat16 matrices: it has them as uint16, and multiplies these numbers."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(part):
        if part.dtype.scalar != tl.bfloat16:
            return part
        return TensorHandle((part.data.astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    )


def random(dtype, *shape):
    return torch.randn(*shape).to(dtype)


def check(found, expected):
    tolerance = TOLERANCE[found.dtype if found.dtype in TOLERANCE else torch.float32]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def attention(query, key, value, is_seen, scale):
    """Return the attention output `(H, K)` of one text; keys and values are `(H, A, K)`."""
    scores = (query.unsqueeze(1) * key).sum(-1) * scale
    return (scores.masked_fill(~is_seen, -torch.inf).softmax(-1).unsqueeze(-1) * value).sum(1)
