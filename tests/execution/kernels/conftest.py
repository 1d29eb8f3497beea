"""Kernels run in Triton's interpreter, which is selected when Triton is imported, or else on a GPU."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter():
    """Skip if Triton's interpreter, the only way to run the kernels on a CPU, is missing, and a GPU too."""
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 from the beginning, as make test has it")
