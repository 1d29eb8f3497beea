"""Runs of a study that take a moment."""

from recurrent_bart.studies.study_run import RunFile, StudyRun

MODEL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pre_seq_len": 4,
    "prefix_hidden_size": 32,
    "init_std": 0.06,
}


def short_run(**changes):
    """Return a run of few steps on one symbol, shown in the first segment; extra arguments change fields."""
    fields = {
        "name": "layerwise",
        "task": {"name": "copy", "n_payload": 1, "n_symbols": 4, "n_fillers": 2},
        "model": MODEL,
        "segment_size": 4,
        "stages": (1, 2),
        "test_segments": (1, 2, 4),
        "max_steps": 6,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "eval_every": 2,
        "eval_documents": 32,
    }
    return StudyRun(**fields | changes)


def begun(folder, *runs):
    """Write and return the files of runs to do."""
    files = [RunFile(folder / run.file_name()) for run in runs]
    for file, run in zip(files, runs, strict=True):
        file.begin(run)
    return files


def all_turns(turns):
    """Run work turn after turn, and return its result."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def record_of(run, accuracy, **changes):
    """Return the record of a finished run, with the same accuracy at each number of segments."""
    tested = {str(n): {"exact_match": accuracy / 2, "token_accuracy": accuracy} for n in run.test_segments}
    record = {
        "run": vars(run),
        "device": "cpu",
        "versions": {"torch": "2.0", "transformers": "5.0"},
        "git_commit": "abc",
        "date": "2026-01-01",
        "n_parameters": 2_500_000,
        "steps": 100,
        "seconds": 10.0,
        "steps_to_reach": 40,
        "seconds_to_reach": 4.0,
        "peak_bytes": 3 * 2**20,
        "curve": [],
        "stopped": "steps",
        "accuracy": tested,
    }
    return record | changes
