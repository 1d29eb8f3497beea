"""What DeepSpeed asks of PyTorch at every parameter of every step, answered in less of the processor's time.

Under ZeRO-3 a step of BART-large asks 5,400 times which stream is current and changes it 1,100 times; asked through
`torch.cuda` each answer looks up which devices there are. It marks 3,900 ranges for a profiler (RESULTS.md).
"""

import contextlib

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import nvtx


def shorten_accelerator_calls() -> None:
    """Have DeepSpeed ask for streams in PyTorch's shortest way, and mark nothing for profilers; of all its engines."""
    nvtx.enable_nvtx = False
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        accelerator.current_stream = torch.accelerator.current_stream
        accelerator.stream = on_stream
        # else it records an event for each gathered parameter, and waits in the middle of a step for buckets to be
        # reduced; a step ends with waiting for all of them
        accelerator.handles_memory_backpressure = lambda: True


def on_stream(stream: torch.Stream | None) -> contextlib.AbstractContextManager:
    """As `torch.cuda.stream`: what is done meanwhile is done on this stream, or where it is done now."""
    return contextlib.nullcontext() if stream is None else _OnStream(stream)


class _OnStream:
    def __init__(self, stream: torch.Stream):
        self.stream = stream

    def __enter__(self) -> None:
        self.before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(self.stream)

    def __exit__(self, *failure: object) -> None:
        torch.accelerator.set_stream(self.before)
