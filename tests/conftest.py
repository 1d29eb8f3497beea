"""What the tests share: models and one seed."""

import os

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from tiny import RECURRENT, TINY, open_gates

# no test may ask the network for anything
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """A tiny model in float64 and evaluation mode, all its gates open; fields may be changed."""

    def make(**changes):
        model = RecurrentBartForConditionalGeneration(RecurrentBartConfig(**{**TINY, **RECURRENT, **changes}))
        open_gates(model)
        return model.double().eval()

    return make


@pytest.fixture
def bart():
    """A tiny plain BART in evaluation mode."""
    config = {name: value for name, value in TINY.items() if name != "hidden_dropout_prob"}
    return BartForConditionalGeneration(BartConfig(**config)).eval()
