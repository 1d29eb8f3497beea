"""Changes of the current stream that take less CPU time than those of `torch.cuda`.

Under ZeRO-3 a step of BART-large asks 5,400 times which stream is current and changes it 1,100 times. Through
`torch.cuda` each answer looks up which devices there are (benchmarks/LOG.md).
"""

import contextlib

import torch


def on_stream(stream: torch.Stream | None) -> contextlib.AbstractContextManager:
    """Return a context manager that makes a stream the current one, as `torch.cuda.stream` does."""
    return contextlib.nullcontext() if stream is None else _OnStream(stream)


class _OnStream:
    def __init__(self, stream: torch.Stream):
        self.stream = stream

    def __enter__(self) -> None:
        self.before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(self.stream)

    def __exit__(self, *failure: object) -> None:
        torch.accelerator.set_stream(self.before)
