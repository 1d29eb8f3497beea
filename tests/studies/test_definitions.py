"""Every study can run."""

import pytest
import torch

from recurrent_bart.studies.definitions import STUDIES, Texts, build_study
from recurrent_bart.studies.memory.single_run import build_config

SYMBOL_STUDIES = sorted(set(STUDIES) - {"babi"})


@pytest.mark.parametrize("name", SYMBOL_STUDIES)
def test_every_run_has_a_model_and_documents_to_train_and_test_on(name):
    runs = build_study(name, Texts())
    assert len({run.file_name() for run in runs}) == len(runs)
    for run in runs[: len(runs) // 3]:
        task, _ = run.build_tasks()
        # RecurrentBartConfig checks its fields
        build_config(run, task)
        for n_segments in {*run.stages, *run.test_segments}:
            task.batch(torch.Generator().manual_seed(0), 1, n_segments, run.segment_size)
        for easier in run.easier:
            changes = dict(easier)
            segment_size, most = changes.pop("segment_size"), changes.pop("n_segments", 1)
            for n_segments in {1, most}:
                run.build_tasks(**changes)[0].batch(torch.Generator().manual_seed(0), 1, n_segments, segment_size)


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("depth", "bptt_depth", [0, 1, 2, 4, -1]),
        ("width", "pre_seq_len", [4, 8, 16, 32, 64, 128]),
        ("context", "decoder_context", ["last", "memory", "all"]),
    ],
)
def test_runs_of_a_study_on_one_field_differ_in_this_field_as_their_names_state(name, field, values):
    runs = build_study(name, Texts(), seeds=[0])
    n_tasks = len({run.task_name() for run in runs})
    configs = {run.name: build_config(run, run.build_tasks()[0]).to_dict() for run in runs}
    assert [(run.name, run.model) for run in runs] == n_tasks * [(f"{field}={v}", {field: v}) for v in values]
    assert [config[field] for config in configs.values()] == values
    for config in configs.values():
        del config[field]
    assert all(config == configs[f"{field}={values[0]}"] for config in configs.values())


def test_the_recurrence_is_compared_with_every_alternative_on_every_task():
    runs = build_study("recurrence", Texts(), seeds=[5])
    assert {run.seed for run in runs} == {5}
    assert len(runs) == 3 * (8 + 2 + 1 + 2 + 2)
    models = {tuple(sorted(run.model.items())) for run in runs if run.window == "segments"}
    assert len(models) == 8 + 2 + 1 + 2
    assert {run.window for run in runs} == {"segments", "all", "last"}


def test_seeds_differ_in_nothing_but_their_seed_and_the_first_comes_first():
    runs = build_study("depth", Texts(), seeds=range(2))
    half = len(runs) // 2
    assert [run.seed for run in runs] == [0] * half + [1] * half
    assert [(run.name, run.task) for run in runs[:half]] == [(run.name, run.task) for run in runs[half:]]


def test_babi_is_told_its_texts():
    runs = build_study("babi", Texts("facts", "filler"), seeds=[0])
    assert {run.task_name() for run in runs} == {"qa1", "qa2", "qa3"}
    assert {run.task["facts"] for run in runs} == {"facts"}
    assert all(run.segment_size * max(run.test_segments) >= 16_000 for run in runs)
    sizes = {run.task_name(): [stage["segment_size"] for stage in run.easier] for run in runs}
    assert sizes == {"qa1": [24, 24, 24, 64, 128], "qa2": [24, 192, 64, 128], "qa3": [24, 192, 64, 128]}
    assert {run.task_name() for run in runs if "with_subjects" in run.task} == {"qa2", "qa3"}
    with pytest.raises(ValueError, match="--facts and --filler"):
        build_study("babi", Texts(facts="facts"))


def test_an_unknown_study_is_refused():
    with pytest.raises(ValueError, match=r"study recurence: allowed are quick, recurrence.*sections"):
        build_study("recurence", Texts())
