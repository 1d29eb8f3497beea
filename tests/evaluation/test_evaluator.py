"""Validation loss and generated texts do not depend on batches and ranks."""

import pytest
import torch

from evaluated_documents import CPU, Words, document_rows, make_evaluator, make_row, section_rows
from processes import run_in_processes
from recurrent_bart.evaluation.evaluator import Generation
from tiny import tiny_model


@pytest.fixture
def model():
    model = tiny_model(init_std=0.8).eval()
    # Strengthen cross-attention; with random weights, all texts would be equal.
    for layer in model.model.decoder.layers:
        layer.encoder_attn.out_proj.weight.data *= 5
    model.generation_config.no_repeat_ngram_size = 1
    return model


@torch.no_grad()
def loss_by_hand(model, evaluator):
    """Return the mean loss, computed for each document by itself and without the model's loss function."""
    losses = []
    for index in evaluator.plan.indices:
        batch = evaluator.collator([{**evaluator.corpus[index], "index": index}])
        logits = model(**batch.model_inputs(CPU)).logits.log_softmax(-1)
        for place in (batch.labels != -100).nonzero():
            losses.append(-float(logits[(*place, batch.labels[tuple(place)])]))
    return sum(losses) / len(losses)


@pytest.mark.each_value
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("task", "rows"), [("document", document_rows), ("sections", section_rows)])
def test_the_loss_is_the_mean_over_all_target_tokens(model, task, rows, batch_size):
    evaluator = make_evaluator(rows(), task, batch_size)
    assert evaluator.loss(model) == pytest.approx(loss_by_hand(model, evaluator), rel=1e-5)


@pytest.mark.each_value
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(("task", "rows"), [("document", document_rows), ("sections", section_rows)])
def test_losses_of_targets_add_up_to_the_total_loss(model, task, rows, batch_size):
    evaluator = make_evaluator(rows(), task, batch_size)

    @torch.no_grad()
    def losses(batch):
        has_target = (batch.labels != -100).any(-1)
        logits, labels = model(**batch.model_inputs(CPU)).logits[has_target], batch.labels[has_target]
        return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(-1)

    found = evaluator.target_losses(losses)
    assert sorted(found) == evaluator.plan.indices
    n_targets = 0
    for index in evaluator.plan.indices:
        batch = evaluator.collator([{**evaluator.corpus[index], "index": index}])
        assert found[index] == pytest.approx(losses(batch).tolist(), rel=1e-4)
        n_targets += batch.n_targets()
    assert sum(map(sum, found.values())) / n_targets == pytest.approx(evaluator.loss(model), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_generated_text_belongs_to_its_document(model, batch_size):
    rows = document_rows()
    samples = make_evaluator(rows, batch_size=batch_size).summarise(model, Generation(max_new_tokens=6))
    assert [sample.id for sample in samples] == ["d0", "d1", "d2", "d3", "d4"]
    assert [sample.target for sample in samples] == [row["summary_texts"][0] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        ids = model.generate(torch.tensor([[0, *row["sections"][0], 2]]), max_new_tokens=6)
        assert sample.generated == Words().decode(ids[0], True)
        assert sample.source == Words().decode(row["sections"][0], True)
    assert len({sample.generated for sample in samples}) > 2


def test_a_generated_text_belongs_to_its_section(model):
    """Sections without tokens or without a target are skipped; sections after the cut are absent."""
    rows = [*section_rows(), make_row("d", [3, 20, 4], [1, 1, 1])]
    samples = make_evaluator(rows, "sections", max_n_segments=3).summarise(model, Generation(max_new_tokens=5))
    told = [("a", 0), ("a", 2), ("b", 0), ("c", 1), ("c", 2), ("d", 0), ("d", 1)]
    by_name = {row["id"]: row for row in rows}
    # The third section of document a begins at the fourth segment, after the cut.
    told.remove(("a", 2))
    assert [sample.target for sample in samples] == [by_name[name]["summary_texts"][place] for name, place in told]
    sources = [Words().decode(by_name[name]["sections"][place], True) for name, place in told]
    assert [sample.source for sample in samples] == sources
    assert [sample.id for sample in samples] == ["a[0]", "b[0]", "c[1]", "c[2]", "d[0]", "d[1]"]
    alone = make_evaluator([by_name["c"]], "sections", max_n_segments=3).summarise(model, Generation(max_new_tokens=5))
    assert [sample.generated for sample in alone] == [s.generated for s in samples if s.id.startswith("c")]


def test_the_name_of_a_text_has_the_index_of_its_section_in_the_record(model):
    """Sections without a target are joined in the corpus, so their indices there are smaller."""
    row = make_row("a", [9, 3, 5], [0, 2, 3]) | {"section_indices": [0, 8, 9], "n_sections": 12}
    samples = make_evaluator([row], "sections").summarise(model, Generation(max_new_tokens=2))
    assert [(sample.id, sample.section) for sample in samples] == [("a[8]", 1), ("a[9]", 2)]


def test_no_text_is_generated_after_segments_without_a_target(model, monkeypatch):
    """Segments with a target may be generated from in groups."""
    chosen, generate = [], model.generate

    def watched(*inputs, target_segments, may_pack, **how):
        chosen.append(target_segments.tolist())
        assert may_pack
        return generate(*inputs, target_segments=target_segments, may_pack=may_pack, **how)

    monkeypatch.setattr(model, "generate", watched)
    make_evaluator([make_row("a", [3, 20, 4], [1, 1, 0])], "sections").summarise(model, Generation(max_new_tokens=2))
    assert chosen == [[[True, False, False, False, True, False]]]


def test_a_target_without_tokens_does_not_shift_the_next_samples(model):
    row = make_row("a", [3, 4], [0, 2])
    row["summary_texts"][0] = "\u200b"
    samples = make_evaluator([row], "sections").summarise(model, Generation(max_new_tokens=4))
    assert [(s.source, s.target) for s in samples] == [
        (Words().decode(row["sections"][1], True), row["summary_texts"][1])
    ]


def test_the_number_of_summarised_documents_is_limited(model):
    evaluator = make_evaluator(document_rows())
    how = Generation(max_new_tokens=3, n_documents=2)
    assert [sample.id for sample in evaluator.summarise(model, how)] == ["d0", "d1"]


def test_beam_search_is_used(model):
    evaluator = make_evaluator(document_rows())
    greedy, beams = (evaluator.summarise(model, Generation(8, num_beams)) for num_beams in (1, 4))
    assert [sample.generated for sample in greedy] != [sample.generated for sample in beams]


def test_a_long_source_is_shown_cut(model):
    samples = make_evaluator([make_row("a", [150], [2])]).summarise(model, Generation(max_new_tokens=2))
    assert samples[0].source.endswith(" …")
    assert len(samples[0].source.split()) == 101


def test_documents_with_the_same_id_get_different_names(model):
    rows = [make_row("a", [9, 3], [2, 3]), make_row("a", [4], [2]), make_row("b", [5], [1])]
    samples = make_evaluator(rows, "sections").summarise(model, Generation(max_new_tokens=2))
    places = [(sample.id, sample.document, sample.section) for sample in samples]
    assert places == [("a (row 0)[0]", 0, 0), ("a (row 0)[1]", 0, 1), ("a (row 1)[0]", 1, 0), ("b[0]", 2, 0)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # a list of questions
        ([("a", "x"), ("a", "x"), ("b", "y")], ["a", "a", "b"]),
        ([(None, "x"), (None, "x"), (None, "y")], ["row 0", "row 0", "row 2"]),
        # one record per question
        ([("q1", "x"), ("q2", "y"), ("q3", "x")], ["q1", "q2", "q1"]),
        # parts of one record
        ([("a", "x"), ("b", "y"), ("a", "z")], ["a", "b", "a"]),
        # the last row relates the first two
        ([("a", "x"), ("b", "y"), ("b", "x"), (None, "y")], ["a", "a", "a", "a"]),
    ],
)
def test_rows_with_the_same_text_or_record_are_one_document(keys, expected):
    same = [make_row(f"row {n}", [4], [2]) | {"record_id": own, "digest": text} for n, (own, text) in enumerate(keys)]
    evaluator = make_evaluator(same)
    assert evaluator.documents == expected
    assert evaluator.n_documents == len(set(expected))
    assert evaluator.names == [row["id"] for row in same]


@pytest.mark.distributed
@pytest.mark.parametrize("task", ["document", "sections"])
def test_two_ranks_give_the_metrics_of_one(model, task, tmp_path):
    """The number of batches is odd, so one rank makes an additional pass that does not count."""
    evaluator = make_evaluator(document_rows() if task == "document" else section_rows(), task)

    def evaluate(rank):
        return evaluator.loss(model), evaluator.summarise(model, Generation(max_new_tokens=5))

    alone = evaluate(0)
    for loss, samples in run_in_processes(evaluate, 2, tmp_path):
        assert loss == pytest.approx(alone[0], rel=1e-6)
        assert samples == alone[1]
