"""What the tests share: models and one seed."""

import os

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from tiny import TINY, tiny_model

# no test may ask the network for anything
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """Makes `tiny_model` in float64 and evaluation mode."""
    return lambda **changes: tiny_model(**changes).double().eval()


@pytest.fixture
def bart():
    """A tiny plain BART in evaluation mode."""
    config = {name: value for name, value in TINY.items() if name != "hidden_dropout_prob"}
    return BartForConditionalGeneration(BartConfig(**config)).eval()
