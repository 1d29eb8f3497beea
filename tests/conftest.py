"""Fixtures of all tests: models, documents and one seed."""

import gc
import os

# no test may use the network; Hugging Face reads this variable when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from launching import load_script
from pairwise import mark_other_cases
from process_state import ProcessState
from runs import write_documents
from tiny import PLAIN, tiny_model


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # before pytest selects tests by their marks
    mark_other_cases(items)


def pytest_collection_finish():
    # modules live until the end: each full collection by DeepSpeed or a test would take half a second for them
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        # without a GPU, `torch.manual_seed` formats and keeps a stack trace for each kind of device
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _process_state():
    """Restore the environment and the loggers; fail the test if it ended the process group that later tests need."""
    state = ProcessState()
    yield
    state.restore()
    if lost := state.lost_group():
        pytest.fail(lost)


@pytest.fixture(scope="session")
def _browser():
    """Install a browser; skip the test with the reason where this machine cannot have one."""
    # import late: it imports matplotlib
    from browser import install

    reason = install()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def make_model():
    """Return a builder of `tiny_model` in float64 and evaluation mode."""
    return lambda **changes: tiny_model(**changes).double().eval()


@pytest.fixture
def bart():
    """Return a tiny plain BART in evaluation mode."""
    return BartForConditionalGeneration(BartConfig(**PLAIN)).eval()


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Return a folder with the documents of short runs."""
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def _short_evaluations(monkeypatch):
    """Disable plots and probes of runs: they take half of a short run's time and have separate tests."""
    monkeypatch.setattr("recurrent_bart.training.session.draw_curves", lambda records, path: None)
    monkeypatch.setattr("recurrent_bart.training.session.probe_recurrence", lambda model, evaluator: {})


@pytest.fixture
def train_main(_short_evaluations):
    """Return `main` of launch/train.py, which runs in this process."""
    return load_script("train").main


@pytest.fixture
def alone(_short_evaluations):
    """Set the environment of a run with one process."""
    from recurrent_bart.training.environment import start_processes

    return start_processes(timeout_minutes=2)
