"""Gradients of all trainable parameters equal the naive reference's, for any combination of options."""

import functools
import itertools
import random

import pytest
import torch

from played_graphs import play_graphs
from recurrent_bart.execution import cuda_graphs, diagonal_graphs, graphed_wavefront, grid, retained_diagonals
from recurrent_bart.model import modeling_decoder
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from reference import context, detached_outside, encode
from tiny import batch_of, random_ids, tiny_model

OPTIONS = {
    "recurrence": ("layerwise", "top", "none"),
    "decoder_context": ("last", "memory", "section", "all"),
    "context_segments": (-1, 2),
    "bptt_depth": (0, 1, 2, -1),
    "prefix_attention": ("concat", "gated"),
    "prefix_projection": (True, False),
    "update_gate": (True, False),
    "associative_memory": (False, True),
    "normalize_before": (False, True),
    "checkpointing": ("none", "layer", "segment"),
    "task": ("document", "sections"),
}
# lengths of segments; the first document is longer than each window, the third ends within the first window
LENGTHS = [[8, 8, 3, 8, 7, 8], [8, 5, 8, 2], [5]]


def is_allowed(case):
    has_state = case.get("recurrence") != "none"
    if case.get("associative_memory") and case.get("recurrence", "layerwise") != "layerwise":
        return False
    return has_state or case.get("decoder_context") != "memory"


def pairs_of(case):
    return set(itertools.combinations(case.items(), 2))


def cases_of_all_pairs(seed=0):
    """Yield allowed cases until each allowed pair of options has occurred."""
    draw, seen = random.Random(seed), set()
    all_pairs = set()
    for (one, ones), (other, others) in itertools.combinations(OPTIONS.items(), 2):
        all_pairs |= {((one, a), (other, b)) for a in ones for b in others if is_allowed({one: a, other: b})}
    while all_pairs - seen:
        drawn = ({name: draw.choice(values) for name, values in OPTIONS.items()} for _ in range(200))
        case = max(filter(is_allowed, drawn), key=lambda it: len(pairs_of(it) - seen))
        seen |= pairs_of(case)
        yield case


CASES = list(cases_of_all_pairs())
# windows without a graph read the learned prefix too, and their context for the decoder has no gradient
STATIC = dict(CASES[0], recurrence="none", associative_memory=False, task="document", context_segments=-1)
CASES += [STATIC | {"decoder_context": seen, "bptt_depth": n} for seen, n in (("section", 0), ("all", 1))]


@pytest.fixture
def captured(monkeypatch):
    """Capture graphs of the encoder and of the decoder, on a CPU."""
    monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device: 200_000)
    monkeypatch.setattr(grid, "is_wavefront_faster", lambda segments: True)
    monkeypatch.setattr(grid, "can_graph", lambda *batch: True)
    monkeypatch.setattr(modeling_decoder, "can_capture", lambda module, inputs: torch.is_grad_enabled())
    return play_graphs(monkeypatch, diagonal_graphs, retained_diagonals, cuda_graphs)


def gradients_of(model, loss):
    """Return the loss and the gradient of each parameter, or None."""
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def naive_loss(model, documents, labels, window):
    """Return the loss of targets decoded one by one, from contexts of the naive reference.

    Args:
        model: The model.
        documents: Documents as lists of segments.
        labels: For each document, the target of each segment that has one.
        window: Segments of a truncated-BPTT window; windows end with the document.
    """
    config, losses = model.config, []
    for document, targets in zip(documents, labels, strict=True):
        n_segments = len(document)
        after, _ = encode(model, document, [t for t in range(1, n_segments) if (n_segments - t) % window == 0])
        for t, target in targets.items():
            # with several targets, each window has its own backward pass
            has_own_pass = len(labels[0]) > 1
            first = max(0, n_segments - ((n_segments - 1 - t) // window + 1) * window) if has_own_pass else 0
            rows = context(config, detached_outside(after, first, t + 1), t, targets if has_own_pass else ())
            n_states = min(t + 1, config.context_segments % 10**6) if config.decoder_context == "memory" else 1
            encoded = RecurrentEncoderOutput(
                last_hidden_state=rows.unsqueeze(0),
                context_mask=torch.ones(1, len(rows), dtype=torch.long),
                n_memory=n_states * config.pre_seq_len if config.has_state else 0,
            )
            losses.append(model(encoder_outputs=encoded, labels=target.unsqueeze(0)).loss)
    # targets have equal lengths
    return sum(losses) / len(losses)


def targets_of(documents, task):
    """Return labels as the model takes them, and for each document the target of each segment that has one."""
    if task == "document":
        labels = random_ids(len(documents), 4)
        return labels, [{len(document) - 1: row} for document, row in zip(documents, labels, strict=True)]
    labels = random_ids(len(documents), max(map(len, documents)), 4)
    # a section of two segments, and sections of one
    has_target = [{t for t in range(len(document)) if t != 2} for document in documents]
    for row, chosen in enumerate(has_target):
        for t in set(range(labels.shape[1])) - chosen:
            labels[row, t] = -100
    return labels, [{t: labels[row, t] for t in sorted(chosen)} for row, chosen in enumerate(has_target)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_each_parameter_has_the_gradient_of_the_reference(captured, case):
    fields = {name: value for name, value in case.items() if name not in ("checkpointing", "task")}
    model = tiny_model(**fields, encoder_layers=2, decoder_layers=1, schedule="sequential").double().train()
    model.set_gradient_checkpointing(case["checkpointing"])
    documents, input_ids, mask = batch_of(LENGTHS)
    labels, targets = targets_of(documents, case["task"])
    expected = gradients_of(model, naive_loss(model, documents, targets, model.config.bptt_window or 10**6))
    can_graph = case["recurrence"] == "layerwise" and not case["associative_memory"]
    names = ["sequential", *["wavefront"] * (case["recurrence"] != "top"), *["auto"] * can_graph]
    for schedule in names:
        model.config.schedule = schedule
        found = gradients_of(model, model(input_ids=input_ids, attention_mask=mask, labels=labels).loss)
        assert [name for name, gradient in found.items() if gradient is None] == []
        for name, gradient in expected.items():
            # the reference does not use parameters whose gradient the window cuts off
            right = torch.zeros_like(found[name]) if gradient is None else gradient
            message = functools.partial("{}, {}: {}".format, schedule, name)
            torch.testing.assert_close(found[name], right, rtol=0, atol=1e-10, msg=message)
    assert bool(captured) == can_graph
