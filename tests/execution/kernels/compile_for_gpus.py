"""Compile the kernels of a decoding step for GPUs that need not be there; print a line for each that does not fit."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recurrent_bart.execution.kernels import row_linear, step_attention

# compute capability, and shared memory of a program in KiB: the cards with the least of it, and H100
GPUS = {89: 99, 90: 227}
TYPES = {"bf16": 2, "fp32": 4}


def compiled_kib(kernel, arguments, n_warps, n_stages, capability):
    """Return the KiB of shared memory of a kernel; `arguments` are constants, or types of the arguments."""
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else kind for name, kind in arguments.items()}
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": n_warps, "num_stages": n_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared / 1024


def context_cases(kind, n_bytes):
    """Yield kernels of attention to a context."""
    for head_width in (64, 128):
        for n_programs in (8, 1000):
            width = step_attention.tile_size(head_width)
            n_keys, n_warps = step_attention.context_tile(n_programs, width * n_bytes)
            pointers = dict.fromkeys(("query", "keys", "values", "mask", "out"), f"*{kind}")
            pointers |= dict.fromkeys(("partial", "largest_out", "total_out"), "*fp32") | {"end": "*i32"}
            numbers = ("n_heads", "n_keys", "n_parts", "part_keys", "document_stride", "head_stride", "key_stride")
            sizes = dict.fromkeys((*numbers, "mask_stride"), "i32") | {"scale": "fp32"}
            fixed = {"TEXTS": 4, "ROWS": 16, "HEAD": head_width, "WIDTH": width, "KEYS": n_keys}
            fixed |= {"HAS_PARTS": True, "HAS_MASK": True, "AHEAD": False}
            yield step_attention._attend_to_context, pointers | sizes | fixed, n_warps, 3


def linear_cases(kind, n_bytes):
    """Yield kernels of products of rows."""
    for rows in (16, 128):
        for is_wide, is_parted in ((False, False), (False, True), (True, False)):
            columns, inner, n_warps, n_stages = row_linear.tile(rows, 512, is_wide, is_parted, n_bytes)
            pointers = dict.fromkeys(("rows", "weight", "bias"), f"*{kind}") | {"out": "*fp32"}
            sizes = dict.fromkeys(("n_rows", "n_out", "width", "part_width", "row_stride"), "i32")
            fixed = {"ROWS": rows, "COLUMNS": columns, "INNER": inner, "HAS_BIAS": True, "HAS_GELU": False}
            yield row_linear._linear, pointers | sizes | fixed | {"AHEAD": False}, n_warps, n_stages


if __name__ == "__main__":
    n_compiled = 0
    for kind, n_bytes in TYPES.items():
        for kernel, arguments, *settings in (*context_cases(kind, n_bytes), *linear_cases(kind, n_bytes)):
            for capability, most in GPUS.items():
                found, n_compiled = compiled_kib(kernel, arguments, *settings, capability), n_compiled + 1
                if found > most:
                    print(f"does not fit: {kernel.__name__} {arguments} needs {found} KiB of {most} on {capability}")
    print(f"{n_compiled} compiled")
