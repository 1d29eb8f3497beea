"""Compile the kernels of a decoding step for GPUs that need not be there; print a line for each that does not fit."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recurrent_bart.execution.kernels import latent_attention, row_linear, step_attention

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


def latent_cases(kind, shared_kib):
    """Yield kernels of attention to encoder outputs, with the tile of a GPU, and of the products around it."""
    names = ("n_rows", "n_keys", "n_parts", "part_keys", "mask_stride")
    pointers = dict.fromkeys(("query", "context", "mask"), f"*{kind}") | {"end": "*i32"}
    pointers |= dict.fromkeys(("partial", "largest_out", "total_out"), "*fp32")
    for width, n_rows in ((512, 32), (1024, 16), (1024, 64)):
        tile = latent_attention.latent_tile(n_rows, width, shared_kib)
        fixed = {"WIDTH": width, "ROWS": tile.rows, "KEYS": tile.keys, "CHUNKS": tile.n_chunks, "CHUNK": tile.chunk}
        fixed |= {"STAGES": tile.n_stages, "HAS_MASK": True, "AHEAD": False}
        yield latent_attention._read_latents, pointers | dict.fromkeys(names, "i32") | fixed, tile.n_chunks, 3
    names = ("n_rows", "width", "n_out", "row_stride", "head_stride", "weight_head_stride", "inner_stride")
    sizes = dict.fromkeys((*names, "column_stride", "out_row_stride", "out_head_stride", "n_texts"), "i32")
    pointers = dict.fromkeys(("rows", "weight", "bias", "out"), f"*{kind}") | {"end": "*i32", "scale": "fp32"}
    query = latent_attention.QUERY_COLUMNS, 64, latent_attention.QUERY_WARPS, 3
    value = latent_attention.VALUE_COLUMNS, latent_attention.VALUE_INNER, latent_attention.VALUE_WARPS, 4
    for columns, inner, n_warps, n_stages in (query, value):
        fixed = {"ROWS": latent_attention.MOST_ROWS, "COLUMNS": columns, "INNER": inner, "AHEAD": False}
        fixed |= {"HAS_BIAS": True, "HAS_END": True}
        yield latent_attention._multiply_heads, pointers | sizes | fixed, n_warps, n_stages


def linear_cases(kind, n_bytes):
    """Yield kernels of products of rows."""
    for rows in (16, 128):
        for is_wide, is_parted in ((False, False), (False, True), (True, False)):
            columns, inner, n_warps, n_stages = row_linear.tile(rows, 512, is_wide, is_parted, n_bytes)
            pointers = dict.fromkeys(("rows", "weight", "bias"), f"*{kind}") | {"out": "*fp32"}
            sizes = dict.fromkeys(("n_rows", "n_out", "width", "part_width", "row_stride"), "i32")
            fixed = {"ROWS": rows, "COLUMNS": columns, "INNER": inner, "HAS_BIAS": True, "HAS_GELU": False}
            yield row_linear._linear, pointers | sizes | fixed | {"AHEAD": False}, n_warps, n_stages


def cases(capability):
    """Yield the kernels that run on a GPU."""
    for kind, n_bytes in TYPES.items():
        yield from context_cases(kind, n_bytes)
        yield from linear_cases(kind, n_bytes)
    yield from latent_cases("bf16", GPUS[capability])


if __name__ == "__main__":
    n_compiled = 0
    for capability, most in GPUS.items():
        for kernel, arguments, *settings in cases(capability):
            found, n_compiled = compiled_kib(kernel, arguments, *settings, capability), n_compiled + 1
            if found > most:
                print(f"does not fit: {kernel.__name__} {arguments} needs {found} KiB of {most} on {capability}")
    print(f"{n_compiled} compiled")
