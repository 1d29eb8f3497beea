"""Metrics of the recurrence on some documents: attention to the state, changes of the state, and its gradient.

Shape suffixes: B documents, N segments, L tokens in a segment, P prefix length, E encoder layers, D model width, T
target length.
"""

import contextlib
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.model.loss import IGNORED
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.probes.memory_reads import plain_execution, read_segment
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence, RecurrentState, per_layer

# per document: the gradient needs the autograd graph of all its segments in memory
MOST_SEGMENTS = 8
# one document: ids (1, N, L), their mask, labels (1, T) or (1, N, T)
Document = tuple[Tensor, Tensor, Tensor]
Table = list[list[float]]


def recurrence_metrics(
    model: RecurrentBartForConditionalGeneration, documents: Sequence[Document]
) -> dict[str, list[float] | Table]:
    """Return metrics of the recurrence, averaged over documents; empty for a model without recurrence.

    The state's metrics cover the first `MOST_SEGMENTS` segments. `gradient_by_distance` is missing if no document has a
    target. The model is in evaluation mode; its parameters get no gradient.
    """
    recurrence = model.model.encoder.recurrence
    if recurrence is None:
        return {}
    results: dict[str, Any] = {}
    if hasattr(recurrence, "prefix_gate"):
        results["prefix_gate"] = torch.tanh(recurrence.prefix_gate.detach().float()).abs().mean(dim=1).tolist()
    with plain_execution(model.config):
        read = [_read(model, ids[:, :MOST_SEGMENTS], mask[:, :MOST_SEGMENTS]) for ids, mask, _ in documents]
        distances = [_gradient_by_distance(model, *document) for document in documents]
    for name in read[0]:
        results[name] = _mean_table([tables[name] for tables in read])
    if "update_gate" in results:
        results["update_gate"] = [fmean(row) for row in results["update_gate"]]
    if any(distances):
        results["gradient_by_distance"] = _mean_row([row for row in distances if row])
    return results


@torch.no_grad()
def _read(model: RecurrentBartForConditionalGeneration, ids_BNL: Tensor, mask_BNL: Tensor) -> dict[str, Table]:
    recurrence = model.model.encoder.recurrence
    state = RecurrentState.unread(model.config, 1, ids_BNL.device)
    old_EPD = recurrence.without_matrix(recurrence.initial_state(1))[:, 0].float()
    columns: dict[str, list[Tensor]] = {"prefix_mass": [], "prefix_size": []}
    for t in range(ids_BNL.shape[1]):
        with _collect_gates(recurrence) as gates:
            output, reads = read_segment(model, ids_BNL[:, t : t + 1], mask_BNL[:, t : t + 1], state)
        assert output.state is not None
        state = output.state
        columns["prefix_mass"].append(reads.mass)
        columns["prefix_size"].append(reads.size.mean(dim=1))
        if state.memory is not None:
            new_EPD = recurrence.without_matrix(state.memory)[0].float()
            columns.setdefault("state_norm", []).append(new_EPD.norm(dim=-1).mean(dim=-1))
            change_E = (new_EPD - old_EPD).flatten(1).norm(dim=1) / old_EPD.flatten(1).norm(dim=1)
            columns.setdefault("state_change", []).append(change_E)
            old_EPD = new_EPD
        for gate_E in gates:
            columns.setdefault("update_gate", []).append(gate_E)
    return {name: torch.stack(column, dim=1).tolist() for name, column in columns.items()}


@contextlib.contextmanager
def _collect_gates(recurrence: PrefixRecurrence) -> Iterator[list[Tensor]]:
    """Collect the mean value of each layer's update gate, `(E,)`, at each update of the state."""
    gates: list[Tensor] = []
    if not recurrence.has_update_gate:
        yield gates
        return
    next_state = recurrence.next_state

    def record(state_EBPD: Tensor, slots_EBPD: Tensor, *others: Any) -> Tensor:
        old_EBPD = recurrence.without_matrix(state_EBPD)
        both = torch.cat([old_EBPD.to(slots_EBPD.dtype), slots_EBPD], dim=-1)
        gate = torch.sigmoid(per_layer(both, recurrence.update_gate, recurrence.update_gate_bias))
        gates.append(gate.float().mean(dim=(1, 2, 3)))
        return next_state(state_EBPD, slots_EBPD, *others)

    # an instance attribute hides the class's method
    vars(recurrence)["next_state"] = record
    try:
        yield gates
    finally:
        del vars(recurrence)["next_state"]


@torch.enable_grad()
def _gradient_by_distance(
    model: RecurrentBartForConditionalGeneration, ids_BNL: Tensor, mask_BNL: Tensor, labels: Tensor
) -> list[float]:
    """Return, per segment, the norm of the loss gradient at the segment's embeddings, from the target's segment back.

    At most `MOST_SEGMENTS` segments have a gradient; earlier segments are encoded without an autograd graph. The list
    is empty for a document without a target.
    """
    last = min(ids_BNL.shape[1], MOST_SEGMENTS) - 1
    if labels.dim() == 3:
        last = _segment_of_target(labels)
        labels = labels[:, max(last, 0)]
    if last < 0:
        return []
    first = max(0, last + 1 - MOST_SEGMENTS)
    state = None
    if first:
        with torch.no_grad():
            state = model.model.encode(ids_BNL[:, :first], mask_BNL[:, :first]).state
    near = slice(first, last + 1)
    embeddings_BNLD = model.model.encoder.embed_tokens(ids_BNL[:, near]).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings_BNLD, attention_mask=mask_BNL[:, near], labels=labels, state=state).loss
    (gradient_BNLD,) = torch.autograd.grad(loss, embeddings_BNLD)
    return gradient_BNLD[0].float().flatten(1).norm(dim=1).flip(0).tolist()


def _segment_of_target(labels_1NT: Tensor) -> int:
    """Return the last segment with a target among the first `MOST_SEGMENTS`, or the first one after them; -1: none."""
    numbers = (labels_1NT[0] != IGNORED).any(dim=1).nonzero().flatten().tolist()
    near = [number for number in numbers if number < MOST_SEGMENTS]
    return near[-1] if near else next(iter(numbers), -1)


def _mean_row(rows: Sequence[Sequence[float]]) -> list[float]:
    longest = max(map(len, rows))
    return [fmean(row[index] for row in rows if index < len(row)) for index in range(longest)]


def _mean_table(tables: Sequence[Table]) -> Table:
    return [_mean_row(rows) for rows in zip(*tables, strict=True)]
