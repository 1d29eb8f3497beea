"""Tests that the map holds the reads of the state, segment by segment."""

import matplotlib.image
import pytest
import torch

from recurrent_bart.probes.memory_map import MemoryMap, as_text, draw_memory_map, map_memory
from recurrent_bart.probes.memory_reads import plain_execution, read_context, read_segment
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import segment_documents
from tiny import random_ids


def document(n_tokens=20):
    """Return three segments of 8 tokens, special tokens included: 6 tokens of text each, and 2."""
    return torch.cat([torch.tensor([[0]]), random_ids(1, n_tokens), torch.tensor([[2]])], dim=1)


@pytest.mark.parametrize("changes", [{}, {"recurrence": "top", "decoder_context": "memory"}, {"input_size": 10}])
def test_the_map_equals_the_reads_of_each_segment(changes, make_model):
    model, ids = make_model(prefix_attention="gated", **changes), document()
    found, summary = map_memory(model, ids, max_new_tokens=5)
    segments, masks = segment_documents(model.config, False, ids, None, None)
    state, n_read = RecurrentState.unread(model.config, 1), 0
    with plain_execution(model.config):
        for t in range(segments.shape[1]):
            output, reads = read_segment(model, segments[:, t : t + 1], masks[:, t : t + 1], state)
            state = output.state
            n_tokens = int(masks[0, t].sum())
            assert [row[t] for row in found.size] == pytest.approx(reads.size.mean(dim=1).tolist())
            assert [row[t] for row in found.mass] == pytest.approx(reads.mass.tolist())
            along = found.along[n_read : n_read + n_tokens]
            assert along == pytest.approx(reads.size.mean(dim=0).tolist())
            n_read += n_tokens
            assert found.segment_ends[t] == n_read
        assert len(found.along) == n_read
        told = read_context(model, output, summary.unsqueeze(0))
    assert segments.shape[1] > 2
    assert found.decoder == pytest.approx(told.size.mean(dim=1).tolist())
    gate = model.model.encoder.recurrence.prefix_gate
    assert found.gate == pytest.approx(gate.tanh().abs().mean(dim=1).tolist())


def test_the_summary_equals_the_output_of_generate(make_model):
    model, ids = make_model(), document()
    config = model.config.to_dict()
    _, summary = map_memory(model, ids, max_new_tokens=6, num_beams=2)
    assert model.config.to_dict() == config
    assert summary.equal(model.generate(ids, max_new_tokens=6, num_beams=2)[0])


@pytest.mark.parametrize("changes", [{"recurrence": "none", "prefix_attention": "gated"}, {}], ids=["static", "concat"])
def test_parts_that_a_model_lacks_are_left_out(changes, make_model, tmp_path):
    found, _ = map_memory(make_model(**changes), document(), max_new_tokens=4)
    assert (found.decoder == []) == ("recurrence" in changes)
    assert (found.gate == []) == ("prefix_attention" not in changes)
    draw_memory_map(found, tmp_path / "map.png")
    assert matplotlib.image.imread(tmp_path / "map.png").shape[1] == 988
    assert ("the decoder's read from the state" in as_text(found)) == bool(found.decoder)
    assert ("gate on the state" in as_text(found)) == bool(found.gate)


def test_a_model_without_a_state_is_refused(make_model):
    with pytest.raises(ValueError, match="pre_seq_len=0: the model has no state"):
        map_memory(make_model(pre_seq_len=0), document())


def test_tables_are_by_layer_and_segment():
    found = MemoryMap([[0.5, 0.25], [0.125, 1.0]], [[0.01, 0.02], [0.03, 0.04]], [0.1], [1], [0.3, 0.4], [0.6])
    lines = [line.split() for line in as_text(found).splitlines()]
    assert lines[1:4] == [["1", "2"], ["1", "0.50", "0.25"], ["2", "0.12", "1.00"]]
    assert lines[5:8] == [["1", "2"], ["1", "0.010", "0.020"], ["2", "0.030", "0.040"]]
    assert lines[9:11] == [["1", "2"], ["0.30", "0.40"]]
    assert lines[12:] == [["1"], ["0.60"]]


def test_neighbouring_segments_share_a_column_in_long_documents():
    row = [float(number) for number in range(25)]
    lines = [line.split() for line in as_text(MemoryMap([row], [row], [0.1], [1], [], [])).splitlines()]
    assert lines[1] == ["1-3", "4-6", "7-9", "10-12", "13-15", "16-18", "19-21", "22-24", "25"]
    assert lines[2] == ["1", "1.0", "4.0", "7.0", "10.0", "13.0", "16.0", "19.0", "22.0", "24.0"]
    assert max(map(len, as_text(MemoryMap([row], [row], [0.1], [1], [], [])).splitlines())) <= 100


@pytest.mark.slow
def test_a_long_document_is_drawn(tmp_path):
    row = [0.1] * 200
    draw_memory_map(
        MemoryMap([row] * 12, [row] * 12, row * 30, list(range(30, 6030, 30)), row[:12], row[:6]), tmp_path / "m"
    )
    assert matplotlib.image.imread(tmp_path / "m").shape[1] == 988
