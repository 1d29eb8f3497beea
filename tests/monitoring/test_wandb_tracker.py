"""wandb has each line of metrics.jsonl exactly once, even if the run is interrupted several times."""

import json
from types import SimpleNamespace

import pytest
import wandb

from monitoring.event_files import wandb_records, wandb_rows, wandb_run
from recurrent_bart.monitoring import wandb_tracker as module
from recurrent_bart.monitoring.wandb_tracker import WandbRun, WandbTracker, redact_secrets, run_id, start_wandb

RECORDS = [{"step": step, "loss": 1.0 / step, "gate": [0.5, 0.25], "slowest_host": "a"} for step in range(1, 7)]


def make_run(folder, **changes):
    values = {"is_online": False, "node": 0, "n_nodes": 1, "host": "alpha", "name": "papers", "group": "papers"}
    return WandbRun(**{"id": "abc123", "folder": folder / "wandb", **values, **changes})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wandb").mkdir()
    return tmp_path


def files(folder):
    """Return the files in order of creation, as `wandb sync` reads them."""
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def log(tracker, records):
    for record in records:
        tracker.log(record)
    return tracker


def rows(records, first=0):
    expected = []
    for place, record in enumerate(records):
        curves = {"step": record["step"], "loss": record["loss"], "gate/0": 0.5, "gate/1": 0.25}
        expected.append({**curves, "_step": first + place})
    return expected


@pytest.mark.slow
def test_an_offline_file_holds_all_rows_and_settings(folder):
    run = make_run(folder, project="p", tags=("a", "b"), config={"run": {"seed": 1}})
    tracker = log(WandbTracker(run, []), RECORDS[:2])
    tracker.alert("stopped", "on purpose")
    assert tracker.finish(True) == f"wandb sync {folder}/wandb/offline-run-*"
    (file,) = files(folder)
    assert wandb_rows(file) == rows(RECORDS[:2])
    written, config = wandb_run(file)
    assert (written.run_id, written.project, written.run_group, written.display_name) == (
        "abc123",
        "p",
        "papers",
        "papers",
    )
    assert list(written.tags) == ["a", "b"]
    assert config["run"] == {"seed": 1}
    kinds = [record.WhichOneof("record_type") for record in wandb_records(file)]
    assert kinds.count("alert") == 1
    metrics = [record.metric for record in wandb_records(file) if record.WhichOneof("record_type") == "metric"]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [("*", "step")]


def test_a_stopped_run_continues_in_a_second_file(folder):
    log(WandbTracker(make_run(folder), []), RECORDS[:3]).finish(True)
    log(WandbTracker(make_run(folder), RECORDS[:3]), RECORDS[3:]).finish(True)
    first, second = files(folder)
    assert wandb_rows(first) == rows(RECORDS[:3])
    assert wandb_rows(second) == rows(RECORDS[3:], first=3)


def test_rows_of_a_killed_run_are_written_again(folder):
    log(WandbTracker(make_run(folder), []), RECORDS[:2]).finish(True)
    cut_off = log(WandbTracker(make_run(folder), RECORDS[:2]), RECORDS[2:5])
    # Simulate a killed run: its data is present, but not marked as complete.
    cut_off.wandb_run.finish()
    # The checkpoint is from step 4.
    log(WandbTracker(make_run(folder), RECORDS[:4]), RECORDS[4:]).finish(True)
    assert [row for file in files(folder) for row in wandb_rows(file)] == rows(RECORDS)
    assert len(files(folder)) == 2


def test_rows_of_a_failed_run_are_written_again(folder):
    log(WandbTracker(make_run(folder), []), RECORDS[:4]).finish(False)
    log(WandbTracker(make_run(folder), RECORDS[:2]), RECORDS[2:]).finish(True)
    (file,) = files(folder)
    assert wandb_rows(file) == rows(RECORDS)


def test_a_run_resumed_from_an_older_checkpoint_logs_no_row_twice(folder):
    log(WandbTracker(make_run(folder), []), RECORDS[:4]).finish(True)
    log(WandbTracker(make_run(folder), RECORDS[:2]), RECORDS[2:]).finish(True)
    assert [row for file in files(folder) for row in wandb_rows(file)] == rows(RECORDS)


def test_each_host_has_an_offline_run_in_one_group(folder):
    for node in (0, 1):
        tracker = WandbTracker(make_run(folder, node=node, n_nodes=2), [])
        log(tracker, RECORDS[:1])
        tracker.alert("title", "text")
        tracker.finish(True)
    found = [wandb_run(file)[0] for file in files(folder)]
    assert [(run.run_id, run.display_name, run.run_group) for run in found] == [
        ("abc123-0", "papers-0", "papers"),
        ("abc123-1", "papers-1", "papers"),
    ]
    assert all(wandb_rows(file) == rows(RECORDS[:1]) for file in files(folder))
    alerts = [sum(r.WhichOneof("record_type") == "alert" for r in wandb_records(file)) for file in files(folder)]
    assert alerts == [1, 0]


class Service:
    """Stand-in for wandb's service, which knows its number of rows."""

    def __init__(self, n_rows=0, directory="/nowhere/run"):
        self.n_rows, self.directory, self.rows, self.given = n_rows, directory, [], []

    def init(self, settings, **arguments):
        self.given.append({**arguments, "settings": settings})
        run = SimpleNamespace(dir=f"{self.directory}/files", step=self.n_rows, define_metric=lambda *_, **__: None)
        run.log = lambda row, step: self.rows.append((step, row["step"]))
        run.finish = lambda exit_code: None
        return run


def serve(monkeypatch, service):
    monkeypatch.setattr(wandb, "init", service.init)
    return service


def test_an_online_run_continues_after_the_last_row_of_the_service(folder, monkeypatch):
    service = serve(monkeypatch, Service(n_rows=3))
    tracker = WandbTracker(make_run(folder, is_online=True), RECORDS[:2])
    log(tracker, RECORDS[2:])
    assert service.rows == [(3, 4), (4, 5), (5, 6)]
    assert tracker.finish(True) is None
    (given,) = service.given
    assert (given["id"], given["mode"], given["resume"]) == ("abc123", "online", "allow")
    assert given["settings"].init_timeout == module.INIT_TIMEOUT
    assert given["settings"].finish_timeout == module.FINISH_TIMEOUT


def test_rows_that_the_online_service_lost_are_sent_again(folder, monkeypatch):
    service = serve(monkeypatch, Service(n_rows=1))
    log(WandbTracker(make_run(folder, is_online=True), RECORDS[:3]), RECORDS[3:4])
    assert service.rows == [(1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_files_of_a_killed_online_run_are_kept(folder, monkeypatch, n_nodes):
    directory = folder / "wandb" / "run-1"
    directory.mkdir()
    serve(monkeypatch, Service(directory=directory))
    run = make_run(folder, is_online=True, n_nodes=n_nodes)
    # the first tracker is never closed
    log(WandbTracker(run, []), RECORDS[:2])
    log(WandbTracker(run, RECORDS[:2]), RECORDS[2:]).finish(True)
    assert directory.is_dir()


def test_hosts_share_one_online_run_into_which_the_first_logs(folder, monkeypatch):
    service = serve(monkeypatch, Service())
    trackers = [WandbTracker(make_run(folder, is_online=True, node=node, n_nodes=2), []) for node in (0, 1)]
    for tracker in trackers:
        log(tracker, RECORDS[:2])
    # A shared run takes no explicit step.
    assert service.rows == [(None, 1), (None, 2)]
    first, second = (given["settings"] for given in service.given)
    assert {given["id"] for given in service.given} == {"abc123"}
    assert (first.mode, first.x_label, first.x_primary) == ("shared", "node-0-alpha", True)
    assert (second.mode, second.x_label, second.x_primary) == ("shared", "node-1-alpha", False)
    assert not second.x_update_finish_state
    # An interrupted and resumed run.
    log(WandbTracker(make_run(folder, is_online=True, n_nodes=2), RECORDS[:1]), RECORDS[1:3])
    assert service.rows == [(None, 1), (None, 2), (None, 3)]


def test_without_the_service_the_run_is_offline_with_one_warning(folder, monkeypatch):
    init, warnings = wandb.init, []

    def fail(settings, **arguments):
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out\nafter 30 sec.")
        return init(settings=settings, **arguments)

    monkeypatch.setattr(wandb, "init", fail)
    tracker = log(start_wandb(make_run(folder, is_online=True), [], warnings.append), RECORDS[:1])
    tracker.finish(True)
    assert warnings == ["wandb: Run initialization has timed out after 30 sec.; wandb continues offline"]
    (file,) = files(folder)
    assert wandb_rows(file) == rows(RECORDS[:1])


def test_the_run_id_is_stored_in_the_folder(tmp_path):
    found = run_id(tmp_path / "wandb")
    assert len(found) == 8
    assert run_id(tmp_path / "wandb") == found
    assert json.loads((tmp_path / "wandb" / "run.json").read_text()) == {"id": found}
    assert run_id(tmp_path / "wandb", wanted="other") == found
    assert run_id(tmp_path / "second", wanted="mine") == run_id(tmp_path / "second") == "mine"


def test_the_users_wandb_settings_are_kept(tmp_path):
    run = make_run(tmp_path, is_online=True)
    assert {"silent", "console", "init_timeout"} <= run.settings().keys()
    kept = {"console", "init_timeout", "project"}
    assert run.settings().keys() - make_run(tmp_path, given=frozenset(kept)).settings().keys() == kept - {"project"}


def test_settings_are_sent_without_secrets():
    settings = {
        "api_key": "k",
        "data": {"hub_token": "t", "train_file": "https://me:pass@host/a", "n_tokens": 5, "tokenizer_name": "bart"},
        "tags": ("s3://user:word@bucket", "b"),
    }
    assert redact_secrets(settings) == {
        "api_key": "***",
        "data": {"hub_token": "***", "train_file": "https://***@host/a", "n_tokens": 5, "tokenizer_name": "bart"},
        "tags": ["s3://***@bucket", "b"],
    }
