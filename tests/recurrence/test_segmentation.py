"""Segmentation of documents."""

import pytest
import torch

from recurrent_bart.recurrence.segmentation import (
    align_at_end,
    gather_segments,
    pad_segments,
    segment_positions,
    shift_segments,
    split_into_segments,
    to_device,
)


def test_special_tokens_stand_around_every_segment():
    segments = split_into_segments(["<s>", *"abcdefg", "</s>"], segment_size=5, input_size=5)
    assert segments == [["<s>", *"abc", "</s>"], ["<s>", *"def", "</s>"], ["<s>", "g", "</s>"]]


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 5])
def test_a_document_that_fits_comes_back_as_it_is(n_tokens):
    tokens = list(range(n_tokens))
    assert split_into_segments(tokens, segment_size=5, input_size=5, n_leading=1, n_trailing=1) == [tokens]


def test_overlap_is_the_tail_of_the_segment_before():
    segments = split_into_segments("abcdefgh", segment_size=3, input_size=5, n_leading=0, n_trailing=0)
    assert ["".join(segment) for segment in segments] == ["abc", "bcdef", "efgh"]


@pytest.mark.parametrize("n_tokens", [1, 6, 7, 8, 13, 62])
@pytest.mark.parametrize("overlap", [0, 2])
def test_every_token_is_new_in_exactly_one_segment(n_tokens, overlap):
    tokens = list(range(n_tokens))
    segments = split_into_segments([-1, *tokens, -2], segment_size=6, input_size=6 + overlap)
    new = [segment[1 + (min(overlap, i * 4) if i else 0) : -1] for i, segment in enumerate(segments)]
    assert [token for segment in new for token in segment] == tokens
    assert all(len(segment) <= 6 + overlap for segment in segments)


def test_no_tokens_and_no_room_are_refused():
    with pytest.raises(ValueError, match="at least 1 token"):
        split_into_segments([], segment_size=5, input_size=5)
    with pytest.raises(ValueError, match="must be more than"):
        split_into_segments([0, 5, 2], segment_size=2, input_size=2)


def test_positions_skip_padding_wherever_it_is():
    ids = torch.tensor([[1, 0, 5, 6, 7, 8, 2], [0, 5, 2, 1, 1, 1, 1]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    positions = segment_positions(mask, ids, special=(0, 2), segment_size=4, input_size=4)
    assert positions.tolist() == [[[1, 2, 3, 6], [1, 4, 5, 6]], [[0, 1, 2, -1], [-1, -1, -1, -1]]]
    assert gather_segments(ids, positions, fill=1).tolist() == [[[0, 5, 6, 2], [0, 7, 8, 2]], [[0, 5, 2, 1], [1] * 4]]


def test_a_language_code_after_the_end_stands_in_every_segment():
    ids = torch.tensor([[5, 6, 7, 2, 58], [5, 6, 7, 8, 2], [5, 6, 7, 8, 9]])
    inputs = torch.ones_like(ids), ids, (0, 2), 4, 4
    positions = segment_positions(*inputs, may_end_with_language=True)
    pieces = gather_segments(ids, positions, fill=1).tolist()
    assert pieces[0] == [[5, 6, 2, 58], [7, 2, 58, 1]]
    assert pieces[1:] == [[[5, 6, 7, 2], [8, 2, 1, 1]], [[5, 6, 7, 8], [9, 1, 1, 1]]]


def test_positions_without_special_tokens_are_plain_pieces():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    positions = segment_positions(torch.ones_like(ids), ids, special=(0, 2), segment_size=3, input_size=3)
    assert positions.tolist() == [[[0, 1, 2], [3, 4, -1]]]


def test_padding_fills_behind_tokens_and_behind_segments():
    padded = pad_segments([[[1, 2], [3]], [[4]]], padding=-1)
    assert padded.tolist() == [[[1, 2], [3, -1]], [[4, -1], [-1, -1]]]


def test_documents_are_aligned_at_their_end_and_moved_back():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0]]).unsqueeze(-1)
    segments = torch.arange(9).view(3, 3)
    aligned, aligned_mask, n_empty = align_at_end(segments, mask)
    assert n_empty.tolist() == [0, 2, 1]
    assert aligned.tolist() == [[0, 1, 2], [4, 5, 3], [8, 6, 7]]
    assert aligned_mask.squeeze(-1).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert torch.equal(shift_segments(aligned, -n_empty), segments)


def test_a_row_without_segments_is_named_or_left_where_it_is():
    mask = torch.tensor([[1, 0], [0, 0]]).unsqueeze(-1)
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        align_at_end(mask, mask)
    *_, n_empty = align_at_end(mask, mask, may_be_empty=True)
    assert n_empty.tolist() == [1, 0]


@pytest.mark.parametrize(
    "known", [torch.eye(4)[:, 1], torch.eye(4).mT, torch.ones(1).expand(4)], ids=["column", "transposed", "expanded"]
)
def test_what_goes_to_a_gpu_is_contiguous_before_it_is_pinned(known, monkeypatch):
    """PyTorch would gather a pinned column of a matrix into pageable memory before the copy."""
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: copied.append(tensor) or tensor)
    found = to_device(known, torch.device("cuda"))
    assert copied == pinned == [found]
    assert found.is_contiguous()
    assert torch.equal(found, known)
