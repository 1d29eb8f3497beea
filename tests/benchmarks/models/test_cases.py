"""Suites contain the project's goals, and only cases that can run."""

import pytest

from recurrent_bart.benchmarks.models.cases import GRAPHED_MODELS, MODELS, SCHEDULES, SUITES, Case, build_suite


def groups_of(name):
    return {group.name: group.cases for group in build_suite(name, [1, 2], [1, 4])}


@pytest.mark.parametrize("name", SUITES)
def test_no_case_is_there_twice_and_none_asks_for_what_a_model_has_not(name):
    groups = build_suite(name, [1, 2], [1, 4])
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert len(set(group.cases)) == len(group.cases)
        # a table has one kind of work and distinct rows
        assert len({case.work for case in group.cases}) == 1
        assert len({(case.label(), case.batch_size, case.n_segments) for case in group.cases}) == len(group.cases)
        others = [case for case in group.cases if case.model != "ours"]
        assert all(case.task == "document" and case.checkpointing in ("none", "layer") for case in others)
        assert all(case.has_state and case.decoder_context == "last" for case in others)
        graphed = [case for case in group.cases if case.graphed]
        assert all(case.model in GRAPHED_MODELS and case.checkpointing == "none" for case in graphed)


def test_the_headline_has_every_alternative_at_the_lengths_of_the_goals():
    groups = groups_of("headline")
    assert {case.model for case in groups["one-document"]} == set(MODELS)
    assert {(case.batch_size, case.n_segments, case.bptt_depth) for case in groups["one-document"]} == {(1, 32, -1)}
    assert Case("led", 32, checkpointing="layer") in groups["one-document"]
    assert Case("ours", 8, batch_size=16) in groups["batch"]
    # plain BART at its best: full batches of 1,024 tokens
    assert Case("bart", 2, batch_size=32) in groups["batch"]
    assert Case("ours", 32, batch_size=16, checkpointing="segment") in groups["batch-checkpointed"]
    assert all(case.checkpointing != "none" for case in groups["batch-checkpointed"])
    assert Case("ours", 128, "inference") in groups["inference"]
    pairs = {(case.model, case.batch_size) for case in groups["generation"]}
    assert pairs == {(model, size) for model in ("ours", "bart") for size in (1, 16)}
    for task in ("document", "sections"):
        numbers = [case.n_segments for case in groups["length"] if case.model == "ours" and case.task == task]
        assert numbers[0] <= 8
        assert {32, 512} <= set(numbers)
    assert all(case.bptt_depth == 2 for case in groups["length"] if case.model in ("ours", "rmt"))


def test_peers_are_measured_in_their_strongest_form_beside_the_default_of_training():
    groups = groups_of("headline")
    default = {"decoder_context": "all", "bptt_depth": -1}
    for name, n_segments, batch_size in (("peers", 32, 1), ("peers-batch", 8, 16), ("peers-reading", 128, 1)):
        cases, work = groups[name], groups[name][0].work
        assert {(case.n_segments, case.batch_size) for case in cases} == {(n_segments, batch_size)}
        assert Case("ours", n_segments, work, batch_size, **default) in cases
        assert Case("ours", n_segments, work, batch_size, **default, has_state=False) in cases
        assert {case.graphed for case in cases if case.model == "segenc"} == {False, True}
    one = groups["peers"]
    assert {case.checkpointing for case in one if case.decoder_context == "all"} == {"none", "layer", "segment"}
    assert Case("rmt", 32, graphed=True) in one
    for model in ("segenc", "bart", "led"):
        assert {Case(model, 32), Case(model, 32, checkpointing="layer")} <= set(one)


def test_a_grid_is_by_documents_and_segments():
    groups = groups_of("grid")
    assert len(groups) == 2 * 2 * 2
    for name, cases in groups.items():
        assert {case.model for case in cases} == set(MODELS)
        assert len({(case.batch_size, case.n_segments) for case in cases}) == 1
        grains = {(case.schedule, case.checkpointing) for case in cases if case.model == "ours"}
        assert len(grains) == (3 * len(SCHEDULES) if name.startswith("training") else len(SCHEDULES))
    only = build_suite("grid", [1], [4], ["sequential"])
    assert {case.schedule for group in only for case in group.cases if case.model == "ours"} == {"sequential"}


def test_memory_is_measured_of_every_way_to_train():
    groups = groups_of("memory")
    cases = [case for group in groups.values() for case in group]
    assert {case.work for case in cases} == {"passes"}
    assert len(cases) == 2 * 2 * 3 * 3 * len(SCHEDULES) * 2


def test_labels_say_what_is_not_as_usual():
    assert Case("ours", 4).label() == "ours, auto"
    assert Case("rmt", 4, bptt_depth=2, checkpointing="layer").label() == (
        "RMT on BART, bptt_depth 2, layer checkpointing"
    )
    assert Case("ours", 4, task="sections", schedule="sequential").label() == "ours, sequential, target per segment"
    assert Case("led", 4, "inference").label() == "LED"
    assert Case("ours", 4, "generation").label() == "ours"
    assert (
        Case("ours", 4, decoder_context="all", has_state=False).label() == "ours, auto, decoder_context all, no state"
    )
    assert Case("rmt", 4, "inference", graphed=True).label() == "RMT on BART, CUDA graph"
