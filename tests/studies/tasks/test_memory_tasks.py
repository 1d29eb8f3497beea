"""The answer of a memory task follows from the document alone."""

import time

import pytest
import torch

from recurrent_bart.studies.tasks.memory_tasks import (
    FIRST_SYMBOL,
    MARK,
    SYMBOL_TASKS,
    Copy,
    Recall,
    Retrieval,
    score,
)

B, L = 5, 27


def draw(task, n_segments=3, seed=0, segment_size=L, batch_size=B):
    return task.batch(torch.Generator().manual_seed(seed), batch_size, n_segments, segment_size)


def solve_copy(document):
    return [token for token in document[0] if token < FIRST_SYMBOL + 32]


def solve_recall(document):
    return [segment[i + 1] for segment in document for i in range(L - 1) if segment[i] == MARK]


def solve_retrieval(document):
    tokens = [token for segment in document for token in segment]
    asked = [tokens[i + 1] for i in range(len(tokens) - 1) if tokens[i] == MARK]
    # the first occurrence of a key is in its pair, because queries are at the end
    return [tokens[tokens.index(key) + 1] for key in asked]


SOLVERS = {
    "copy": solve_copy,
    "recall": solve_recall,
    "retrieval": solve_retrieval,
}


@pytest.mark.parametrize("n_segments", [2, 3, 16])
@pytest.mark.parametrize("name", SYMBOL_TASKS)
def test_who_reads_the_whole_document_knows_the_answer(name, n_segments):
    task = SYMBOL_TASKS[name]()
    input_ids, labels = draw(task, n_segments)
    assert input_ids.shape == (B, n_segments, L)
    assert labels.shape == (B, task.target_length(n_segments))
    assert [SOLVERS[name](document) for document in input_ids.tolist()] == labels.tolist()


@pytest.mark.parametrize("name", SYMBOL_TASKS)
def test_documents_follow_from_the_seed(name):
    task = SYMBOL_TASKS[name]()
    first, again, other = draw(task, seed=1), draw(task, seed=1), draw(task, seed=2)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    # documents of a batch differ
    assert len({tuple(row) for row in first[1].tolist()}) == B


@pytest.mark.parametrize(
    ("name", "vocab_size", "tokens", "answer"),
    [
        ("copy", 69, [36, 29, 6, 6, 12, 14], [36, 29, 6, 6, 12, 14]),
        ("recall", 37, [3, 36, 26, 5, 8, 32], [36, 29, 6, 6, 12, 14]),
        ("retrieval", 69, [49, 52, 58, 37, 40, 64], [24, 26, 33, 30, 31, 25]),
    ],
)
def test_documents_of_a_seed_stay_the_same_in_every_version(name, vocab_size, tokens, answer):
    """Check the first ids against values of the version that wrote studies/LOG.md."""
    task = SYMBOL_TASKS[name]()
    input_ids, labels = draw(task, batch_size=1)
    assert task.vocab_size == vocab_size
    assert input_ids[0, 0, :6].tolist() == tokens
    assert labels[0, :6].tolist() == answer


@pytest.mark.parametrize("name", SYMBOL_TASKS)
def test_every_id_is_a_token_of_the_vocabulary_and_all_are_used(name):
    task = SYMBOL_TASKS[name]()
    input_ids, labels = draw(task, n_segments=8, batch_size=64)
    used = set(input_ids.unique().tolist())
    assert set(range(FIRST_SYMBOL, task.vocab_size)) <= used <= set(range(MARK, task.vocab_size))
    assert set(labels.unique().tolist()) <= set(range(FIRST_SYMBOL, FIRST_SYMBOL + task.n_symbols))


def test_a_payload_is_in_the_first_segment_alone():
    task = Copy()
    input_ids, _ = draw(task)
    is_symbol = input_ids < FIRST_SYMBOL + task.n_symbols
    assert is_symbol[:, 0].sum(dim=-1).tolist() == [24] * B
    assert not is_symbol[:, 1:].any()


def test_marks_of_recall_are_in_every_segment_at_places_that_differ():
    input_ids, _ = draw(Recall(n_marked=4), n_segments=6)
    assert ((input_ids == MARK).sum(dim=-1) == 4).all()
    assert len({tuple(segment) for segment in (input_ids == MARK).flatten(0, 1).tolist()}) > 20


def test_pairs_come_to_every_segment_and_the_queries_to_the_last():
    pairs, _ = draw(Retrieval(n_pairs=4, n_queries=2), n_segments=4, batch_size=64)
    is_key = (pairs >= FIRST_SYMBOL) & (pairs < FIRST_SYMBOL + 16)
    assert is_key.any(dim=-1).any(dim=0).all()
    assert is_key.sum(dim=(1, 2)).tolist() == [4 + 2] * 64
    assert (pairs == MARK).sum(dim=-1).tolist() == [[0, 0, 0, 2]] * 64


def test_keys_of_a_document_differ_and_each_is_asked_for_once():
    input_ids, _ = draw(Retrieval(n_pairs=16, n_queries=16), n_segments=4, segment_size=40)
    keys = [
        [token for token in document if FIRST_SYMBOL <= token < FIRST_SYMBOL + 16]
        for document in input_ids.flatten(1).tolist()
    ]
    assert all(sorted(row[:16]) == sorted(row[16:]) == list(range(FIRST_SYMBOL, FIRST_SYMBOL + 16)) for row in keys)
    # the order of queries differs from the order of pairs, else the position alone would determine the answer
    assert any(row[:16] != row[16:] for row in keys)


@pytest.mark.parametrize(
    ("task", "segment_size"),
    [(Copy(), 23), (Recall(), 7), (Retrieval(), 15), (Retrieval(), 30)],
    ids=["copy", "recall", "queries", "pairs"],
)
def test_what_does_not_fit_is_refused(task, segment_size):
    with pytest.raises(ValueError, match=r"the task needs \d+ positions"):
        draw(task, n_segments=1, segment_size=segment_size)


def test_more_pairs_than_keys_are_refused():
    with pytest.raises(ValueError, match="n_pairs=17"):
        Retrieval(n_pairs=17)
    with pytest.raises(ValueError, match="n_queries=5"):
        Retrieval(n_pairs=4, n_queries=5)


def test_accuracy_counts_whole_answers_and_tokens_and_no_padding():
    labels = torch.tensor([[5, 6, 7], [8, 9, -100], [5, -100, -100]])
    predicted = torch.tensor([[5, 6, 8], [8, 9, 1], [6, -100, -100]])
    assert score(predicted, labels) == pytest.approx((1 / 3, 4 / 6))
    assert score(labels, labels) == (1.0, 1.0)


def test_drawing_is_much_faster_than_a_step_of_training():
    for name, task in SYMBOL_TASKS.items():
        generator = torch.Generator().manual_seed(0)
        fastest = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            task().batch(generator, 32, 8, 64)
            fastest = min(fastest, time.perf_counter() - started)
        assert fastest < 0.01, name


@pytest.mark.parametrize("segment_size", [8, 9, 27])
def test_answers_of_retrieval_are_asked_for_at_their_keys(segment_size):
    task = Retrieval(n_pairs=4, n_queries=3)
    input_ids, labels = draw(task, segment_size=segment_size)
    keys = input_ids[:, -1, task.answer_places(segment_size)]
    for document, asked, answers in zip(input_ids.flatten(1).tolist(), keys.tolist(), labels.tolist(), strict=True):
        assert [document[document.index(key) + 1] for key in asked] == answers
    assert Copy().answer_places(segment_size) is None


@pytest.mark.parametrize("segment_size", [8, 27])
def test_denoising_asks_for_pairs_in_their_own_places(segment_size):
    task = Retrieval(n_pairs=3, n_queries=2, is_denoising=True)
    input_ids, labels = draw(task, segment_size=segment_size)
    plain, answers = draw(Retrieval(n_pairs=3, n_queries=2), segment_size=segment_size)
    assert labels.shape == (B, task.target_length(3))
    assert torch.equal(labels[:, 1::2], answers)
    questions = input_ids[:, -1, task.answer_places(segment_size)]
    assert torch.equal(questions[:, ::2], labels[:, ::2])
    assert (questions[:, 1::2] == MARK).all()
    # the rest of the document is equal
    is_asked = torch.zeros(segment_size, dtype=torch.bool)
    is_asked[task.answer_places(segment_size)] = True
    assert torch.equal(input_ids[:, :-1], plain[:, :-1])
    assert torch.equal(input_ids[:, -1, ~is_asked], plain[:, -1, ~is_asked])
