"""Tests that the metrics of the recurrence are correct and that measuring changes nothing."""

import itertools
import math

import pytest
import torch

from recurrent_bart.probes import recurrence_metrics as module
from recurrent_bart.probes.recurrence_metrics import recurrence_metrics
from tiny import random_ids

N_LAYERS = 3


def document(n_segments=3, n_targets=5, task="document"):
    ids = random_ids(1, n_segments, 8)
    labels = random_ids(1, n_targets) if task == "document" else random_ids(1, n_segments, n_targets)
    return ids, torch.ones_like(ids), labels


@torch.no_grad()
def states(model, ids):
    """Return the state before the first segment and after each, each `(E, P, D)`, of documents read at once."""
    first = model.model.encoder.recurrence.initial_memory.detach()
    return [first, *(model.model.encode(ids[:, : n + 1]).state.memory[0] for n in range(ids.shape[1]))]


def set_gates(model, update=None, prefix=None):
    with torch.no_grad():
        recurrence = model.model.encoder.recurrence
        if update is not None:
            recurrence.update_gate.zero_()
            recurrence.update_gate_bias.fill_(math.log(update / (1 - update)))
        if prefix is not None:
            recurrence.prefix_gate.copy_(torch.tensor(prefix).atanh().view(-1, 1).expand(-1, 4))


def test_gate_openings_equal_the_gate_parameters(make_model):
    model = make_model(prefix_attention="gated")
    set_gates(model, update=0.3, prefix=[0.0, 0.5, -0.25])
    figures = recurrence_metrics(model, [document()])
    assert figures["update_gate"] == pytest.approx([0.3] * N_LAYERS, rel=1e-5)
    assert figures["prefix_gate"] == pytest.approx([0.0, 0.5, 0.25], abs=1e-6)
    # separate softmax over the prefix, scaled by the gate
    expected = [[0.0] * 3, [0.5 / 1.5] * 3, [0.25 / 1.25] * 3]
    assert torch.tensor(figures["prefix_mass"]) == pytest.approx(torch.tensor(expected), abs=1e-5)


def test_prefix_mass_is_the_share_of_the_joint_softmax(make_model):
    model = make_model(prefix_attention="concat", _attn_implementation="eager")
    ids, mask, labels = document()
    mask[0, 1, 5:] = 0
    figures = recurrence_metrics(model, [(ids, mask, labels)])
    with torch.no_grad():
        attentions = model.model.encode(ids, mask, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        masses = [weights[0, t, :, : mask[0, t].sum(), :3].sum(-1).mean() for t in range(3)]
        assert figures["prefix_mass"][layer] == pytest.approx([float(mass) for mass in masses], rel=1e-5)
    assert "prefix_gate" not in figures


@pytest.mark.parametrize("recurrence", ["layerwise", "top"])
def test_state_metrics_equal_those_of_a_plain_forward_pass(make_model, recurrence):
    model = make_model(recurrence=recurrence)
    ids, mask, labels = document(4)
    figures = recurrence_metrics(model, [(ids, mask, labels)])
    found = states(model, ids)
    for t, (old, new) in enumerate(itertools.pairwise(found)):
        for layer in range(len(new)):
            assert figures["state_norm"][layer][t] == pytest.approx(float(new[layer].norm(dim=-1).mean()), rel=1e-4)
            change = float((new[layer] - old[layer]).norm() / old[layer].norm())
            assert figures["state_change"][layer][t] == pytest.approx(change, rel=1e-4)
    assert len(figures["state_norm"]) == (N_LAYERS if recurrence == "layerwise" else 1)


@pytest.mark.parametrize(("task", "is_tied"), [("document", True), ("sections", True), ("document", False)])
def test_gradient_by_distance_belongs_to_the_last_target(make_model, task, is_tied):
    # the metric does not depend on the truncated-BPTT window
    model = make_model(bptt_depth=0, tie_word_embeddings=is_tied)
    ids, mask, labels = document(3, task=task)
    figures = recurrence_metrics(model, [(ids, mask, labels)])
    model.config.bptt_depth = -1
    embeddings = model.model.encoder.embed_tokens(ids).detach().requires_grad_()
    last = labels if task == "document" else labels[:, -1]
    model(inputs_embeds=embeddings, labels=last).loss.backward()
    expected = [float(embeddings.grad[0, t].norm()) for t in (2, 1, 0)]
    assert figures["gradient_by_distance"] == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0


def test_segments_after_the_last_target_have_no_gradient(make_model):
    model = make_model()
    ids, mask, labels = document(4, task="sections")
    labels[:, 3] = -100
    assert len(recurrence_metrics(model, [(ids, mask, labels)])["gradient_by_distance"]) == 3


@pytest.mark.parametrize("context", ["last", "all", "section"])
def test_a_late_first_target_gives_the_gradient(make_model, context):
    """Check that there are still `MOST_SEGMENTS` segments, and that the target's is the last."""
    model = make_model(decoder_context=context)
    ids, mask, labels = document(module.MOST_SEGMENTS + 4, task="sections")
    last = module.MOST_SEGMENTS + 1
    labels[:, :last] = -100
    found = recurrence_metrics(model, [(ids, mask, labels)])["gradient_by_distance"]
    embeddings = model.model.encoder.embed_tokens(ids[:, : last + 1]).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=labels[:, last]).loss.backward()
    expected = [float(norm) for norm in embeddings.grad[0].flatten(1).norm(dim=1).flip(0)]
    assert found == pytest.approx(expected[: module.MOST_SEGMENTS], rel=1e-5)
    assert len(found) == module.MOST_SEGMENTS


def test_documents_without_a_target_have_no_gradient_by_distance(make_model):
    model = make_model()
    told, untold = (document(3, task="sections") for _ in range(2))
    untold[2].fill_(-100)
    alone, both = recurrence_metrics(model, [told]), recurrence_metrics(model, [told, untold])
    assert both["gradient_by_distance"] == alone["gradient_by_distance"]
    none = recurrence_metrics(model, [untold])
    assert none.keys() == alone.keys() - {"gradient_by_distance"}
    assert "state_norm" in none


def test_a_state_that_is_never_written_passes_no_gradient(make_model):
    model = make_model()
    set_gates(model, update=1e-9)
    figures = recurrence_metrics(model, [document()])
    nearest, *others = figures["gradient_by_distance"]
    assert nearest > 1e-3
    assert max(others) < 1e-6 * nearest
    assert max(map(max, figures["state_change"])) < 1e-6


def test_metrics_are_means_over_the_documents_with_that_segment(make_model):
    model = make_model()
    short, long = document(2), document(3)
    both, alone, other = (recurrence_metrics(model, documents) for documents in ([short, long], [short], [long]))
    for name in ("state_norm", "gradient_by_distance"):
        rows = [figures[name][0] if name == "state_norm" else figures[name] for figures in (both, alone, other)]
        expected = [(a + b) / 2 for a, b in zip(rows[1], rows[2], strict=False)] + rows[2][2:]
        assert rows[0] == pytest.approx(expected)


def test_only_the_first_segments_are_measured(make_model):
    model = make_model()
    n_segments = module.MOST_SEGMENTS + 2
    for task in ("document", "sections"):
        figures = recurrence_metrics(model, [document(n_segments, task=task)])
        assert len(figures["gradient_by_distance"]) == len(figures["state_norm"][0]) == module.MOST_SEGMENTS


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"pre_seq_len": 0}, set()),
        (
            {"recurrence": "none", "prefix_attention": "gated"},
            {"prefix_gate", "prefix_mass", "prefix_size", "gradient_by_distance"},
        ),
        (
            {"update_gate": False},
            {"prefix_mass", "prefix_size", "state_norm", "state_change", "gradient_by_distance"},
        ),
    ],
)
def test_parts_that_a_model_lacks_are_left_out(make_model, changes, names):
    assert recurrence_metrics(make_model(**changes), [document()]).keys() == names


def test_state_metrics_are_computed_from_the_slots(make_model):
    """Compare with an associative memory, which changes only its matrix rows while its gate is closed."""
    model, beside = make_model(), make_model(associative_memory=True)
    beside.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        beside.model.encoder.recurrence.matrix_gate.zero_()
    ids = document()
    found, expected = (recurrence_metrics(each, [ids]) for each in (beside, model))
    assert found.keys() == expected.keys()
    for name, figures in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(figures), msg=name)


def test_measuring_does_not_change_the_model(make_model):
    model, documents = make_model(bptt_depth=1, prefix_attention="gated"), [document()]
    config, generator = model.config.to_dict(), torch.get_rng_state()
    attributes = set(vars(model.model.encoder.recurrence))
    figures = recurrence_metrics(model, documents)
    assert model.config.to_dict() == config
    assert torch.get_rng_state().equal(generator)
    assert set(vars(model.model.encoder.recurrence)) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert figures.keys() == {
        "prefix_gate",
        "update_gate",
        "prefix_mass",
        "prefix_size",
        "state_norm",
        "state_change",
        "gradient_by_distance",
    }
