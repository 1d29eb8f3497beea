"""Validation loss and generated texts do not depend on batches and ranks."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from processes import run_in_processes
from recurrent_bart.data.batches import Collator, SegmentSizes, plan_documents
from recurrent_bart.evaluation.evaluator import Evaluator, Generation, Sample, score
from tiny import tiny_model

CPU = torch.device("cpu")


class Words:
    """Tokenizer that decodes ids to numbers without special tokens."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids if int(i) > 3)


def make_row(name, section_lengths, summary_lengths):
    sections = [torch.randint(4, 60, (length,)).tolist() for length in section_lengths]
    summaries = [torch.randint(4, 60, (length,)).tolist() for length in summary_lengths]
    return {
        "id": name,
        "sections": sections,
        "summaries": summaries,
        "summary_texts": [" ".join(map(str, summary)) for summary in summaries],
        "section_lengths": section_lengths,
        "summary_lengths": summary_lengths,
    }


def make_evaluator(rows, task="document", batch_size=2, max_n_segments=-1):
    sizes = SegmentSizes(8, 8, max_n_segments)
    plan = plan_documents([r["section_lengths"] for r in rows], [r["summary_lengths"] for r in rows], sizes, 2)
    collator = Collator(task, sizes, [0], [2], 1, 12)
    return Evaluator(Dataset.from_list(rows), plan, collator, Words(), batch_size, CPU)


def document_rows():
    lengths = [(20, 3), (4, 9), (13, 1), (6, 5), (30, 2)]
    return [make_row(f"d{i}", [text], [target]) for i, (text, target) in enumerate(lengths)]


def section_rows():
    return [
        make_row("a", [9, 3, 5], [2, 0, 3]),
        make_row("b", [2], [4]),
        make_row("c", [0, 4, 14], [2, 1, 1]),
    ]


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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("task", "rows"), [("document", document_rows), ("sections", section_rows)])
def test_the_loss_is_the_mean_over_all_target_tokens(model, task, rows, batch_size):
    evaluator = make_evaluator(rows(), task, batch_size)
    assert evaluator.loss(model) == pytest.approx(loss_by_hand(model, evaluator), rel=1e-5)


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
    assert [sample.id for sample in samples] == ["a[0]", "b[0]", "c[0]", "c[1]", "d[0]", "d[1]"]
    alone = make_evaluator([by_name["c"]], "sections", max_n_segments=3).summarise(model, Generation(max_new_tokens=5))
    assert [sample.generated for sample in alone] == [s.generated for s in samples if s.id.startswith("c")]


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


def test_samples_are_scored_against_their_targets(model):
    samples = make_evaluator(document_rows()).summarise(model, Generation(max_new_tokens=6))
    perfect = [replace(s, target=s.generated) for s in samples if s.generated]
    assert score(perfect)["rouge1"].mean == pytest.approx(100)
    assert score(samples)["rouge1"].mean < 50


def test_sections_of_documents_with_the_same_id_are_not_mixed(model):
    rows = [make_row("a", [9, 3], [2, 3]), make_row("a", [4], [2]), make_row("b", [5], [1])]
    samples = make_evaluator(rows, "sections").summarise(model, Generation(max_new_tokens=2))
    assert [(sample.id, sample.document) for sample in samples] == [("a[0]", 0), ("a[1]", 0), ("a[0]", 1), ("b[0]", 2)]


def scored(n_documents, n_sections):
    """Score documents whose sections are all equal; document n has n of 20 words right."""
    words = [f"w{number}" for number in range(20)]
    texts = [" ".join(words[:n] + ["x"] * (20 - n)) for n in range(n_documents)]
    numbers = range(n_sections)
    return score([Sample("", "", " ".join(words), text, n) for n, text in enumerate(texts) for _ in numbers])


def test_intervals_of_sections_resample_documents():
    """Copies of a document's sections carry no new information, so the interval must not become narrower."""
    once, six_times = scored(n_documents=15, n_sections=1), scored(n_documents=15, n_sections=6)
    for name, found in once.items():
        ends = found.low, found.mean, found.high
        assert (six_times[name].low, six_times[name].mean, six_times[name].high) == pytest.approx(ends)
    # Computed by hand: the standard deviation of 0 to 14 is 4.472, Student's t is 2.145, and a word is 5 %.
    assert once["rouge1"].high - once["rouge1"].low == pytest.approx(2 * 2.145 * 5 * 4.472 / 15**0.5, rel=0.04)


def test_one_document_with_many_sections_has_no_interval():
    found = scored(n_documents=1, n_sections=6)["rouge1"]
    assert (found.low, found.mean, found.high) == (None, 0.0, None)


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
