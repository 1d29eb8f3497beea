"""Kernels run by Triton's interpreter, which takes the place of its compiler when Triton is imported."""

import os

import pytest


@pytest.fixture(autouse=True)
def interpreter():
    """Without it there is nothing to run kernels on a processor with."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 from the beginning, as make test has it")
