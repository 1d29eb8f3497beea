"""Kernels run in Triton's interpreter, which is selected when Triton is imported."""

import os

import pytest


@pytest.fixture(autouse=True)
def interpreter():
    """Skip if Triton's interpreter, the only way to run the kernels on a CPU, is missing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 from the beginning, as make test has it")
