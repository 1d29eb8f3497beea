"""Every study on documents has runs that training accepts."""

import pytest

from recurrent_bart.studies.documents.definitions import TEXT_STUDIES, build_text_study
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.studies.documents.training import parse_run


@pytest.mark.parametrize("task", ["document", "sections"])
def test_every_run_on_documents_has_flags_that_training_takes(task):
    runs = build_text_study(task, "some/papers", seconds=9.0, segment_size=64)
    assert len({run.file_name() for run in runs}) == len(runs) == 3 * len(TEXT_STUDIES[task].variants)
    for run in runs:
        arguments = parse_run(run)
        assert (arguments.data.task, arguments.data.dataset) == (task, "some/papers")
        assert (arguments.model.segment_size, run.seconds, arguments.run.seed) == (64, 9.0, run.seed)
        # the learning rate must not depend on the length of a run
        assert (arguments.run.lr_scheduler, arguments.run.warmup_steps) == ("constant", 200)
        assert run.task_name() == f"papers {task}"
        # gap sentences are for documents with much text and few targets
        assert arguments.data.gap_sentences == (3 if task == "sections" else 0)
        is_published_rmt = (arguments.model.prefix_attention, arguments.model.prefix_projection) == ("concat", False)
        assert is_published_rmt == (run.name == "top (RMT)")


def test_models_on_documents_differ_in_what_they_are_said_to():
    told = {
        run.name: (run.reads, run.flags.get("pre_seq_len"), run.flags.get("recurrence"))
        for run in build_text_study("document", seeds=[0])
    }
    assert told == {
        "layerwise": ("segments", None, None),
        "top (RMT)": ("segments", None, "top"),
        "none": ("segments", None, "none"),
        "BART, first 1,024 tokens": ("heads", 0, None),
        "BART, last segment": ("segments", 0, None),
        "LED": ("whole", None, None),
    }


def test_models_on_sections_name_what_their_decoder_sees():
    """Check that every model sets its decoder context.

    The default of launch/train.py for sections would make plain BART read one segment as a section of several.
    """
    told = {run.name: run.flags["decoder_context"] for run in build_text_study("sections", seeds=[0])}
    several = {
        "layerwise, states of all segments": "memory",
        "layerwise, last two segments of the section": "section",
        "layerwise, tokens of the section": "section",
        "layerwise, tokens of all segments": "all",
    }
    assert told == dict.fromkeys(told, "last") | several


def test_a_run_that_is_cut_short_warms_up_no_longer_than_it_lasts():
    run = build_text_study("document", max_steps=4)[0]
    assert parse_run(run).run.warmup_steps == 4


@pytest.mark.parametrize(("name", "task"), [("documents-pretrained", "document"), ("sections-pretrained", "sections")])
def test_runs_of_pretrained_models_train_for_equal_steps_on_the_same_documents(name, task):
    runs = build_text_study(name, "some/papers", seeds=[1], model_name_or_path="some/bart")
    parsed = [parse_run(run) for run in runs]
    assert len({run.file_name() for run in runs}) == len(TEXT_STUDIES[name].variants)
    assert {run.seconds for run in runs} == {None}
    settings = {"num_beams": 1, "do_sample": False, "no_repeat_ngram_size": 3}
    assert all(p.run.generation_settings() == settings for p in parsed)
    assert {(p.data.task, p.model.model_name_or_path, p.run.max_steps) for p in parsed} == {(task, "some/bart", 600)}
    # overlaps keep the positions of a segment
    assert {p.model.input_size or p.model.segment_size for p in parsed} == {512}
    # documents of a step, and tokens that a model may read of one document
    assert {p.run.per_device_train_batch_size * p.run.gradient_accumulation_steps for p in parsed} == {16}
    n_read = {p.model.segment_size * p.model.max_n_segments for p in parsed}
    assert n_read == ({6144} if task == "document" else {8192})


def test_a_study_and_its_kind_of_model_fit():
    with pytest.raises(ValueError, match="documents-pretrained needs the folder of a pretrained BART"):
        build_text_study("documents-pretrained")
    with pytest.raises(ValueError, match="study document trains from scratch"):
        build_text_study("document", model_name_or_path="some/bart")


def test_time_limits():
    assert {run.seconds for run in build_text_study("document")} == {300.0}
    assert {run.seconds for run in build_text_study("document", seconds=7.0)} == {7.0}


def test_changed_sizes_hold_for_every_model():
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "segment_size": 64}
    runs = build_text_study("documents-pretrained", seeds=[0], model_name_or_path="some/bart", **changes)
    for run in map(parse_run, runs):
        assert run.run.per_device_train_batch_size * run.run.gradient_accumulation_steps == 6
        assert run.model.segment_size * run.model.max_n_segments == 64 * 12


@pytest.mark.parametrize("reads", ["segments", "heads"])
def test_led_reads_documents_whole(reads):
    with pytest.raises(ValueError, match=f"needs reads='whole', not '{reads}'"):
        TextRun("LED", "papers", reads=reads, model="led")
