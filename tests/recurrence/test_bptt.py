"""Windows of truncated BPTT, and the segments that have an autograd graph."""

import pytest
import torch

from recurrent_bart.recurrence.bptt import BpttWindows, n_segments_with_graph, state_windows, target_windows
from tiny import tiny_model

ALL_READ = torch.ones(2, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("size", "starts", "numbers", "borders"),
    [
        (None, [0], [0, 0, 0, 0, 0, 0], []),
        (1, [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]),
        (2, [0, 2, 4], [2, 2, 1, 1, 0, 0], [0, 2, 4]),
        (4, [0, 2], [1, 1, 0, 0, 0, 0], [2]),
        (9, [0], [0, 0, 0, 0, 0, 0], []),
    ],
)
def test_windows_end_at_the_last_segment(size, starts, numbers, borders):
    windows = BpttWindows(6, size)
    assert windows.starts() == starts
    assert [windows.number(segment) for segment in range(6)] == numbers
    assert windows.number(torch.arange(6)).tolist() == numbers
    assert [segment for segment in range(6) if windows.detaches_before(segment)] == borders


@pytest.mark.parametrize(
    ("context", "context_segments", "depth", "expected"),
    [
        ("last", -1, 0, 1),
        ("last", -1, 2, 3),
        ("last", -1, -1, 7),
        ("all", -1, 0, 7),
        ("all", -1, 2, 7),
        ("section", -1, 2, 7),
        ("memory", -1, 0, 7),
        ("all", 2, 0, 2),
        ("all", 2, -1, 7),
        # a window that the decoder sees has a graph as a whole
        ("all", 4, 2, 6),
        ("memory", 4, 2, 6),
        ("all", 99, 2, 7),
    ],
)
def test_the_graph_covers_each_window_that_the_decoder_sees(context, context_segments, depth, expected):
    fields = {"decoder_context": context, "context_segments": context_segments, "bptt_depth": depth}
    config = tiny_model(**fields).config
    assert n_segments_with_graph(config, ALL_READ, has_target_segments=False) == expected
    assert n_segments_with_graph(config, ALL_READ, has_target_segments=True) == 7
    assert n_segments_with_graph(config, ALL_READ[:, :0], has_target_segments=False) == 0


@pytest.mark.parametrize("fields", [{"pre_seq_len": 0}, {"recurrence": "none"}], ids=str)
@pytest.mark.parametrize("depth", [0, 2, -1])
@pytest.mark.parametrize(("context", "context_segments", "expected"), [("last", -1, 1), ("all", -1, 7), ("all", 3, 3)])
def test_without_a_state_exactly_the_segments_in_the_context_have_a_graph(
    fields, depth, context, context_segments, expected
):
    fields = fields | {"decoder_context": context, "context_segments": context_segments, "bptt_depth": depth}
    config = tiny_model(**fields).config
    assert n_segments_with_graph(config, ALL_READ, has_target_segments=False) == expected
    assert state_windows(config, 7).size == 1
    # targets of several segments still have a backward pass per window, which bounds memory
    assert target_windows(config, 7).size == (None if depth == -1 else depth + 1)


def test_the_last_segments_are_those_that_documents_have():
    config = tiny_model(decoder_context="all", context_segments=3, bptt_depth=0).config
    is_read = torch.tensor([[1, 1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1]]).bool()
    # the first document's last three segments have the indices 2, 4 and 6
    assert n_segments_with_graph(config, is_read, has_target_segments=False) == 5
    # a document with fewer segments needs no graph before its first one
    assert n_segments_with_graph(config, is_read[1:], has_target_segments=False) == 2
