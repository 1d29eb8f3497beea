"""Every model reads the part of a batch that it needs, and its loss equals the loss of the full batch."""

import pytest
import torch

from recurrent_bart.data.batches import Collator, SegmentSizes
from recurrent_bart.studies.documents.models import HeadCollator, Reader, collate_as, without_memory
from tiny import tiny_model

CPU = torch.device("cpu")
SIZES = SegmentSizes(8, 8, 4)


def make_row(sections, summaries):
    """Return a row of random ids with sections and targets of these lengths."""
    texts = [[torch.randint(4, 60, (n,)).tolist() for n in lengths] for lengths in (sections, summaries)]
    return {"index": 0, "sections": texts[0], "summaries": texts[1]}


def make_batch(task):
    rows = [make_row([20], [3]), make_row([4], [5])]
    if task == "sections":
        rows = [make_row([9, 3, 5], [2, 0, 3]), make_row([2], [4])]
    return Collator(task, SIZES, [0], [2], 1, 12)(rows)


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("changes", [{"pre_seq_len": 0}, {"recurrence": "none"}])
def test_without_a_state_less_is_read_to_the_same_losses(task, changes):
    model, batch = tiny_model(**changes).double().eval(), make_batch(task)
    less = without_memory(batch)
    assert less.n_tokens() < batch.n_tokens()
    assert less.n_targets() == batch.n_targets()
    loss, of_less = (model(**part.model_inputs(CPU)).loss for part in (batch, less))
    torch.testing.assert_close(loss, of_less)


def test_nothing_is_left_of_padding_and_of_segments_without_a_target():
    less = without_memory(make_batch("sections"))
    # 9 tokens make two segments; the second has the last 3 tokens
    assert less.attention_mask.sum(-1).flatten().tolist() == [5, 7, 4]
    assert less.input_ids.shape == (3, 1, 7)
    assert without_memory(make_batch("document")).attention_mask.sum(-1).flatten().tolist() == [4, 6]


def test_with_a_state_everything_is_read():
    batch = make_batch("document")
    assert Reader(None, True, CPU).needed(batch) is batch
    assert Reader(None, False, CPU).needed(batch).n_tokens() < batch.n_tokens()


@pytest.mark.parametrize("task", ["document", "sections"])
def test_losses_of_targets_add_up_to_the_loss(task):
    reader, batch = Reader(tiny_model().eval(), True, CPU), make_batch(task)
    losses = reader.target_losses(batch)
    assert losses.shape == ((batch.labels != -100).any(-1).sum(),)
    torch.testing.assert_close(losses.sum(), reader.loss(batch, 1).detach())


@pytest.mark.parametrize("may_plan", [True, False])
def test_cudnn_plans_no_attention_of_which_each_step_has_another_shape(may_plan):
    model, allowed = tiny_model(pre_seq_len=0).train(), []
    model.model.encoder.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    reader, batch = Reader(model, True, CPU, may_plan), make_batch("sections")
    reader.loss(batch, 1)
    reader.target_losses(batch)
    assert allowed == [may_plan] * 2
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_head_is_two_segments_long_and_has_the_targets_that_others_have():
    by_segments = Collator("sections", SIZES, [0], [2], 1, 12)
    row = make_row([30, 3, 40, 5], [2, 0, 3, 4])
    segments, targets = collate_as("heads", by_segments).segments(row)
    # the first section fills the maximum of four segments
    assert (segments, targets) == ([[0, *row["sections"][0][:14], 2]], [[0, *row["summaries"][0], 2]])
    row = make_row([3, 2, 4], [2, 0, 3])
    segments, targets = HeadCollator(**vars(by_segments)).segments(row)
    assert segments == [[0, *row["sections"][place], 2] for place in (0, 2)]
    assert targets == [target for target in by_segments.segments(row)[1] if target]


def test_a_whole_document_is_as_long_as_its_segments_are_together():
    row = make_row([50], [2])
    collator = collate_as("whole", Collator("document", SIZES, [0], [2], 1, 12))
    batch = collator([row])
    assert batch.input_ids.tolist() == [[[0, *row["sections"][0][:30], 2]]]
    with pytest.raises(ValueError, match="LED needs a maximum document length"):
        collate_as("whole", Collator("document", SegmentSizes(8, 8, -1), [0], [2], 1, 12))


def test_read_by_segments_nothing_is_changed():
    collator = Collator("document", SIZES, [0], [2], 1, 12)
    assert collate_as("segments", collator) is collator
