"""What the tests share: models, documents and one seed."""

import os

# no test may ask the network for anything; Hugging Face reads it once, when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from launching import load_script
from runs import write_documents
from tiny import PLAIN, tiny_model


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
    return BartForConditionalGeneration(BartConfig(**PLAIN)).eval()


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A folder with the documents of short runs."""
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def _environ():
    """What a test starts in its own process leaves the environment as it was."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def _no_curves(monkeypatch):
    """Runs draw no pictures, which is half of the time of a short one, and tested elsewhere."""
    monkeypatch.setattr("recurrent_bart.training.session.draw_curves", lambda records, path: None)


@pytest.fixture
def train_main(_environ, _no_curves):
    """`main` of launch/train.py, to be called in this process."""
    return load_script("train").main


@pytest.fixture
def alone(_environ, _no_curves):
    """The environment of this process as the only one of a run."""
    from recurrent_bart.training.environment import start_processes

    return start_processes(timeout_minutes=2)
