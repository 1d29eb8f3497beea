"""Every tracker receives the metrics, and a failing tracker does not stop the run."""

import json

import pytest

from monitoring.event_files import tensorboard_points
from recurrent_bart.monitoring.tensorboard_tracker import TensorBoardTracker
from recurrent_bart.monitoring.tracker import Guarded, MetricsFile, Trackers, curves_of
from recurrent_bart.run_folder import RunFolder


class DiagonalGraphs:
    """Keeps what it is told; fails while it is broken."""

    def __init__(self):
        self.told, self.is_broken = [], False

    def log(self, record):
        if self.is_broken:
            raise OSError("no space left on\n device")
        self.told.append(record)

    def alert(self, title, text):
        self.log((title, text))

    def finish(self, is_success):
        self.log(is_success)
        return "do this"


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_all_trackers_get_the_finite_values():
    recorders = [DiagonalGraphs(), DiagonalGraphs()]
    trackers = Trackers(recorders)
    trackers.log({"step": 1, "loss": 2.0, "loss_max": float("nan"), "seconds": float("inf"), "none": None, "host": "a"})
    trackers.alert("title", "text")
    assert trackers.finish(True) == ["do this"] * 2
    assert recorders[0].told == recorders[1].told == [{"step": 1, "loss": 2.0, "host": "a"}, ("title", "text"), True]


def test_a_tracker_that_cannot_start_gives_one_warning():
    def fail():
        raise RuntimeError("no\nnetwork")

    warnings = []
    guarded = Guarded("wandb", fail, warnings.append)
    guarded.log({})
    guarded.alert("title", "text")
    assert guarded.finish(True) is None
    assert warnings == ["wandb: no network; training continues without wandb"]


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_failing_tracker_is_dropped_or_tried_again(gives_up):
    warnings, recorder = [], DiagonalGraphs()
    guarded = Guarded("it", lambda: recorder, warnings.append, gives_up)
    for is_broken in (False, True, True, False):
        recorder.is_broken = is_broken
        guarded.log({"broken": is_broken})
    assert warnings == ["it: no space left on device; training continues without it"]
    assert recorder.told == [{"broken": False}] * (1 if gives_up else 2)


def test_an_interrupt_is_not_a_tracker_failure():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded("it", interrupt, print)


def test_the_metrics_file_is_written_again_after_a_full_disk(folder, monkeypatch):
    warnings = []
    trackers = Trackers([Guarded("metrics.jsonl", lambda: MetricsFile(folder), warnings.append, gives_up=False)])
    trackers.log({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        trackers.log({"step": 2})
    # A full disk leaves an incomplete line.
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    trackers.log({"step": 3})
    assert len(warnings) == 1
    assert [record["step"] for record in folder.read_metrics()] == [1, 3]


def test_lists_and_tables_become_curves():
    record = {"step": 3, "loss": 0.5, "host": "a", "gate": [0.1, 0.2], "mass": [[1.0, 2.0], [3.0, 6.0]]}
    assert curves_of(record) == {
        "step": 3,
        "loss": 0.5,
        "gate/0": 0.1,
        "gate/1": 0.2,
        "mass/layer_0": 1.5,
        "mass/layer_1": 4.5,
        "mass/segment_0": 2.0,
        "mass/segment_1": 4.0,
    }


def test_tensorboard_has_each_point_once_after_a_resume(folder):
    records = [{"step": step, "loss": 1.0 / step, "gate": [0.5]} for step in (1, 2, 3)]
    place = folder.path / "tensorboard"
    cut_off = TensorBoardTracker(place, [])
    for record in records:
        cut_off.log(record)
    cut_off.finish(False)
    # The checkpoint is from step 2.
    resumed = TensorBoardTracker(place, records[:2])
    resumed.log(records[2])
    resumed.alert("title", "text")
    resumed.finish(True)
    expected = [
        (name, step, pytest.approx(value))
        for step in (1, 2, 3)
        for name, value in (("loss", 1 / step), ("gate/0", 0.5))
    ]
    assert tensorboard_points(place) == expected
