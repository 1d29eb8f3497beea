"""Functions that several kernels use: division of rows into programs, sums over programs, dropout, and layer norm."""

# Shape suffixes: E encoder layers (of a diagonal), W width of a row.

import torch
import triton
from torch import Tensor
from triton import language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    # an older Triton, without programmatic dependent launch
    gdc_launch_dependents = gdc_wait = None

# programs per streaming multiprocessor, for kernels that sum over rows
PROGRAMS_PER_PROCESSOR = 4
# size of a program's tile in `add_up`
CHUNKS, COLUMNS = 16, 128


def n_chunks(n_layers: int, n_rows: int, device: torch.device) -> int:
    """Return the number of Triton programs for the rows of one layer; all layers' programs together fill the GPU."""
    n_processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(n_rows, PROGRAMS_PER_PROCESSOR * n_processors // n_layers))


def early_start(device: torch.device) -> dict[str, bool]:
    """Return the arguments of a kernel that may start before the previous kernel ends: its constant `AHEAD`, and how.

    This is CUDA's programmatic dependent launch, from compute capability 9 on. With `AHEAD`, a kernel must call
    `gdc_wait` before it reads results, and before it writes.
    """
    is_possible = device.type == "cuda" and torch.version.cuda is not None and gdc_wait is not None
    if is_possible and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"AHEAD": True, "launch_pdl": True}
    return {"AHEAD": False}


def add_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension (programs) in a fixed order, and convert the result to `dtype`."""
    out = sums.new_empty(sums.shape[1:], dtype=dtype)
    _add_up[(triton.cdiv(out.numel(), COLUMNS),)](
        sums, out, len(sums), out.numel(), CHUNKS=CHUNKS, COLUMNS=COLUMNS
    )  # fmt: skip
    return out


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed `(1,)` for one dropout call from the device's random generator."""
    return torch.randint(2**31 - 1, (1,), device=device)


@triton.jit
def _add_up(sums, out, n_chunks, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([CHUNKS, COLUMNS], dtype=tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        total += tl.load(sums + chunk * width + column, (chunk < n_chunks) & (column < width), 0.0)
    tl.store(out + column, tl.sum(total, axis=0)[None, :].to(out.dtype.element_ty), column < width)


@triton.jit
def drop(values, seed_pointer, row, p, BLOCK: tl.constexpr):
    """Apply dropout with probability `p` to a row; the same seed and row give the same zeros."""
    quarter = row.to(tl.int32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    first, second, third, fourth = tl.rand4x(tl.load(seed_pointer), quarter)
    uniform = tl.reshape(tl.join(tl.join(first, second), tl.join(third, fourth)), [BLOCK])
    return tl.where(uniform >= p, values / (1.0 - p), 0.0)


@triton.jit
def standardize(values, inside, width, epsilon):
    """Return a row with mean 0 and variance 1, its former mean, and the factor that divided by the deviation."""
    average = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - average, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    return centred * factor, average, factor


@triton.jit
def standardize_gradient(gradient, standardized, factor, width):
    """Return the gradient of a row from the gradient of the standardized row."""
    along = tl.sum(gradient * standardized, axis=0) / width
    return (gradient - tl.sum(gradient, axis=0) / width - standardized * along) * factor
