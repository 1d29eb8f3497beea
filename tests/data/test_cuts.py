"""Messages about cut documents and targets, with their share and the flag that changes the limit."""

import pytest

from recurrent_bart.data.batches import Collator, SegmentSizes, plan_documents
from recurrent_bart.data.cuts import describe_cuts

# A section of 4 tokens is one segment. The target of 7 tokens is too long.
SECTIONS = [[4, 4, 4], [4], [4, 4], [12, 4]]
TARGETS = [[2, 0, 7], [7], [2, 3], [0, 2]]


def lines(max_n_segments, max_target_length):
    sizes = SegmentSizes(6, 6, max_n_segments)
    plan = plan_documents(SECTIONS, TARGETS, sizes, n_special=2, max_target_length=max_target_length)
    return list(describe_cuts("validation", plan, Collator("sections", sizes, [0], [2], 1, max_target_length)))


def test_uncut_documents_give_no_message():
    assert lines(-1, 9) == []


def test_cut_documents_and_targets_are_counted():
    assert lines(2, 8) == [
        "cut        1 of 4 (25.0 %) validation documents after 2 segments (--max_n_segments)",
        "cut        2 of 6 (33.3 %) validation targets with their sections, after 2 segments (--max_n_segments); "
        "1 documents lose all targets",
        "cut        1 of 4 (25.0 %) validation targets after 8 tokens, special tokens included (--max_target_length)",
    ]


@pytest.mark.parametrize(("length", "n_cut"), [(9, 0), (8, 2), (5, 2), (4, 3), (3, 6)])
def test_the_number_of_cut_targets_equals_that_of_the_collator(length, n_cut):
    collator = Collator("sections", SegmentSizes(6, 6, -1), [0], [2], 1, length)
    targets = [[5] * n for own in TARGETS for n in own if n]
    assert sum(len(collator.target(target)) - 2 < len(target) for target in targets) == n_cut
    expected = f"cut        {n_cut} of 6 ({100 * n_cut / 6:.1f} %) validation targets after {length} tokens"
    assert [line.startswith(expected) for line in lines(-1, length)] == [True] * bool(n_cut)
