"""Streams that are current in a block only."""

import pytest
import torch

from recurrent_bart.training.zero.accelerator_calls import on_stream


@pytest.fixture
def current(monkeypatch):
    """Simulate an accelerator; return a list whose last item is the current stream."""
    streams = ["default"]
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.accelerator, "set_stream", streams.append)
    return streams


def test_a_stream_is_current_until_its_block_ends(current):
    with on_stream("copies"):
        assert current[-1] == "copies"
        with on_stream("reduction"):
            assert current[-1] == "reduction"
        assert current[-1] == "copies"
    assert current[-1] == "default"


def test_the_stream_before_is_current_again_after_an_error(current):
    with pytest.raises(KeyError), on_stream("copies"):
        raise KeyError
    assert current[-1] == "default"


def test_no_stream_changes_nothing(current):
    with on_stream(None):
        assert current == ["default"]
    assert current == ["default"]
