"""Trackers of a run: on two hosts, interrupted and resumed, and with failing services."""

import contextlib
import json
import math
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import wandb

from forked import launched, run_script
from launching import forks, free_port, run
from monitoring.event_files import tensorboard_points, wandb_records, wandb_rows, wandb_run
from recurrent_bart.monitoring import wandb_tracker
from recurrent_bart.monitoring.fields import CHECKPOINTS, EVALUATIONS, FIELDS, SCORES, SKIPS, STEPS
from recurrent_bart.monitoring.tracker import curves_of
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.probing import probe_recurrence
from recurrent_bart.training.tracking import _first_id
from recurrent_bart.training.trainer import Trainer
from runs import flags

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"
WORKER = Path(__file__).with_name("tracking_worker.py")
# the documents have one to three sections, and at most two segments are read
RUN = {
    "max_steps": 4,
    "eval_every": 2,
    "wandb_mode": "offline",
    "max_n_segments": 2,
    "tensorboard": True,
    # this setting logs all metrics
    "prefix_attention": "gated",
}


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wandb_files(folder):
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def run_nodes(arguments, **variables):
    """Run two processes that are each told to be the only one of its host; return what they left."""
    nodes = [{**place, "LOCAL_RANK": 0, **variables} for place in launched(2)]
    return run_script(WORKER, *arguments, environments=nodes, timeout=200)


@pytest.fixture(scope="module")
def two_nodes(documents, tmp_path_factory):
    """Return the folder and last output of a run on two hosts, killed after step 3 and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "papers"
    ended = run_nodes(flags(documents, folder, **RUN), KILL="1")
    assert ended.codes == [-9, -9], ended.text()
    killed = [record["step"] for record in read_metrics(folder)]
    assert killed[-1] == 3
    ended = run_nodes(["--resume", folder])
    assert ended.codes == [0, 0], ended.text()
    return folder, ended.printed


@pytest.mark.distributed
@pytest.mark.slow
class TestTwoMachines:
    def test_each_has_one_run_of_one_group(self, two_nodes):
        folder, _ = two_nodes
        identity = json.loads((folder / "wandb" / "run.json").read_text())["id"]
        runs = [wandb_run(file)[0] for file in wandb_files(folder)]
        assert sorted(run.run_id for run in runs) == [f"{identity}-0", f"{identity}-1"]
        assert {run.run_group for run in runs} == {"papers"}

    def test_every_line_is_there_once_in_its_order_with_its_values(self, two_nodes):
        folder, _ = two_nodes
        records = read_metrics(folder)
        expected = [{**curves_of(record), "_step": place} for place, record in enumerate(records)]
        files = wandb_files(folder)
        assert len(files) == 2
        for file in files:
            rows = wandb_rows(file)
            assert rows == [pytest.approx(row) for row in expected]
        assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
        assert [record["step"] for record in records if "validation_loss" in record] == [0, 2, 4]
        assert [record["step"] for record in records if "checkpoint_seconds" in record] == [2, 4]

    def test_every_field_is_there_and_explained(self, two_nodes):
        folder, _ = two_nodes
        records = read_metrics(folder)
        steps = [record for record in records if "loss" in record]
        evaluations = [record for record in records if "validation_loss" in record]
        assert all(record.keys() == {"step", *STEPS} - {"gold_probability", "curriculum_segments"} for record in steps)
        # a score that no text defines is left out, for example repeated 4-grams of texts of three words
        always = {"step", *EVALUATIONS} - (SCORES.keys() - {"rouge1", "rouge2", "rougeL", "rougeLsum"})
        assert all(always <= record.keys() <= {"step", *EVALUATIONS} for record in evaluations[1:])
        assert all(FIELDS[name] or name.startswith("rouge") for name in {*STEPS, *EVALUATIONS, *SKIPS, *CHECKPOINTS})

    def test_the_values_are_those_of_the_run(self, two_nodes):
        folder, _ = two_nodes
        host = socket.gethostname()
        for record in (record for record in read_metrics(folder) if "loss" in record):
            parts = record["gradient_norm_backbone"], record["gradient_norm_recurrence"]
            assert math.hypot(*parts) == pytest.approx(record["gradient_norm"], rel=1e-4)
            assert record["loss"] <= record["loss_max"] < 2 * record["loss"]
            assert record["tokens_per_second_per_device"] == pytest.approx(record["tokens_per_second"] / 2)
            assert record["slowest_host"] == record["fastest_host"] == host
            assert {record["slowest_rank"], record["fastest_rank"]} == {0, 1}
            assert record["rank_seconds"][record["slowest_rank"]] == record["slowest_seconds"]
            assert record["rank_seconds"][record["fastest_rank"]] == record["fastest_seconds"]
            parts = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "step_seconds")
            assert min(record[name] for name in parts) > 0
            assert 0 < record["model_flops_share"] < 1
            assert 1e8 < record["memory_allocated_bytes"] < 1e11
            assert 1 <= record["segments_per_document"] <= 2
            assert record["n_skipped"] == 0

    def test_what_to_do_is_said_once(self, two_nodes):
        folder, printed = two_nodes
        command = f"wandb sync {folder}/wandb/offline-run-*"
        assert [text.count(command) for text in printed] == [1, 0]

    def test_tensorboard_has_the_same_points(self, two_nodes):
        folder, _ = two_nodes
        expected = [
            (name, record["step"], pytest.approx(number, rel=1e-5))
            for record in read_metrics(folder)
            for name, number in curves_of(record).items()
            if name != "step"
        ]
        assert tensorboard_points(folder / "tensorboard") == expected


@pytest.mark.slow
def test_documents_that_are_cut_are_counted(documents, tmp_path, train_main):
    assert train_main(flags(documents, tmp_path / "run", max_steps=2, max_n_segments=2)) == 0
    lengths = [json.loads(line)["sections"] for line in (documents / "train.jsonl").open()]
    # segments have 16 tokens, including 2 special tokens; a word has at least one token
    at_least = sum(len(" ".join(sections).split()) > 2 * 14 for sections in lengths)
    line, _ = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert at_least <= line["n_cut_documents"] <= len(lengths)
    assert at_least > 0


@pytest.fixture
def _fresh_wandb():
    """Stop wandb's service, which keeps the environment variables of its start."""
    wandb.teardown()
    yield
    wandb.teardown()


@contextlib.contextmanager
def asked_service():
    """Start a server that refuses each request; yield its address and the requests it received."""
    requests = []

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(self.path)
            self.send_error(500)

        def do_GET(self):
            self.do_POST()

        def log_message(self, *_):
            """Print nothing."""

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def warnings_of(printed):
    return [line for line in printed.splitlines() if line.startswith("warning")]


@pytest.mark.slow
def test_runs_that_are_not_online_send_nothing_even_when_their_process_ends(documents, tmp_path):
    """Check the end of the process, where the library wandb sends statistics about itself.

    The runs are forks of a new process that has imported what they need except wandb.
    """
    modes = ("dryrun", "disabled")
    given = {"max_steps": 2, "eval_every": 2, "eval_documents": 1, "wandb_mode": "auto"}
    runs = [({"WANDB_MODE": mode}, [SCRIPT, *flags(documents, tmp_path / mode, **given)]) for mode in modes]
    command = forks(runs, ["recurrent_bart.commands.train"], "wandb")
    with asked_service() as (address, requests):
        variables = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": address}
        code, output = run(command, timeout=250, **variables)
    assert code == 0, output
    assert requests == []
    assert output.count("model in ") == len(modes)


@pytest.mark.usefixtures("_fresh_wandb")
class TestOutOfOrder:
    @pytest.mark.slow
    def test_without_a_network_it_goes_on_offline(self, documents, tmp_path, train_main, monkeypatch, capfd):
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setattr(wandb_tracker, "INIT_TIMEOUT", 2.0)
        run = tmp_path / "run"
        assert train_main(flags(documents, run, max_steps=2, wandb_mode="auto")) == 0
        printed = "".join(capfd.readouterr())
        (warning,) = warnings_of(printed)
        assert warning.endswith("wandb continues offline")
        assert f"wandb sync {run}/wandb/offline-run-*" in printed
        (file,) = wandb_files(run)
        assert len(wandb_rows(file)) == len(read_metrics(run))

    @pytest.mark.slow
    def test_without_a_key_it_goes_on_offline(self, documents, tmp_path, train_main, monkeypatch, capfd):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        run = tmp_path / "run"
        assert train_main(flags(documents, run, max_steps=2, wandb_mode="online")) == 0
        (warning,) = warnings_of("".join(capfd.readouterr()))
        assert "no API key is set" in warning
        assert len(wandb_files(run)) == 1

    @pytest.mark.slow
    def test_where_it_cannot_write_it_goes_on_without(self, documents, tmp_path, train_main, capfd):
        run = tmp_path / "run"
        run.mkdir()
        (run / "wandb").write_text("")
        assert train_main(flags(documents, run, max_steps=2, wandb_mode="offline")) == 0
        (warning,) = warnings_of("".join(capfd.readouterr()))
        assert warning.startswith("warning: wandb: ")
        assert [record["step"] for record in read_metrics(run) if "loss" in record] == [1, 2]

    @pytest.mark.slow
    def test_all_that_wandb_writes_lies_in_the_run_folder(self, documents, tmp_path, train_main, monkeypatch):
        monkeypatch.setenv("WANDB_DIR", "/proc/nowhere")
        run = tmp_path / "run"
        assert train_main(flags(documents, run, max_steps=2, wandb_mode="offline", wandb_tags="a, b")) == 0
        folders = {name: os.environ[f"WANDB_{name}"] for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
        assert folders.pop("DIR") == str(run)
        assert all(Path(place).is_relative_to(run / "wandb") and Path(place).is_dir() for place in folders.values())
        (file,) = wandb_files(run)
        written, config = wandb_run(file)
        assert list(written.tags) == ["a", "b"]
        assert written.project == "recurrent-bart"
        assert config["arguments"]["run"]["max_steps"] == 2
        assert config["model"]["segment_size"] == 16

    @pytest.mark.slow
    def test_what_the_user_told_wandb_holds_over_our_defaults(self, documents, tmp_path, train_main, monkeypatch):
        said = {"PROJECT": "minutes", "RUN_GROUP": "spring", "ENTITY": "us", "NAME": "first", "TAGS": "a, b"}
        for name, value in (said | {"NOTES": "a note", "RUN_ID": "mine", "JOB_TYPE": "try"}).items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        run = tmp_path / "run"
        assert train_main(flags(documents, run, max_steps=2, wandb_mode="offline")) == 0
        (file,) = wandb_files(run)
        written, _ = wandb_run(file)
        assert (written.project, written.run_group, written.entity) == ("minutes", "spring", "us")
        assert (written.display_name, list(written.tags), written.notes) == ("first", ["a", "b"], "a note")
        assert (written.run_id, written.job_type) == ("mine", "try")

    @pytest.mark.slow
    def test_a_flag_holds_over_what_the_user_told_wandb(self, documents, tmp_path, train_main, monkeypatch):
        for name in ("PROJECT", "RUN_GROUP", "ENTITY", "TAGS"):
            monkeypatch.setenv(f"WANDB_{name}", "variable")
        given = {"wandb_project": "p", "wandb_group": "g", "wandb_entity": "e", "wandb_tags": "t"}
        run = tmp_path / "run"
        assert train_main(flags(documents, run, max_steps=2, wandb_mode="offline", **given)) == 0
        written, _ = wandb_run(wandb_files(run)[0])
        assert (written.project, written.run_group, written.entity, list(written.tags)) == ("p", "g", "e", ["t"])

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["dryrun", "OFFLINE"])
    def test_with_a_key_and_an_offline_mode_nothing_is_sent(self, documents, tmp_path, train_main, monkeypatch, mode):
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_MODE", mode)
        with asked_service() as (address, requests):
            monkeypatch.setenv("WANDB_BASE_URL", address)
            run = tmp_path / "run"
            assert train_main(flags(documents, run, max_steps=2, wandb_mode="auto")) == 0
        assert requests == []
        assert len(wandb_rows(wandb_files(run)[0])) == len(read_metrics(run))

    def test_an_unknown_mode_ends_in_one_line_and_leaves_nothing(
        self, documents, tmp_path, train_main, monkeypatch, capsys
    ):
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_MODE", "of-line")
        assert train_main(flags(documents, tmp_path / "run", wandb_mode="auto")) == 2
        assert "error: WANDB_MODE of-line" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_skipped_step_and_the_end_are_told(self, documents, tmp_path, train_main, monkeypatch):
        step = Trainer.train_step

        def spoilt(trainer):
            handle = trainer.engine.module.register_forward_hook(_spoil)
            step(trainer)
            handle.remove()

        monkeypatch.setattr(Trainer, "train_step", spoilt)
        assert train_main(flags(documents, tmp_path / "run", max_steps=2, wandb_mode="offline")) == 0
        (file,) = wandb_files(tmp_path / "run")
        alerts = [record.alert.title for record in wandb_records(file) if record.WhichOneof("record_type") == "alert"]
        assert alerts == ["step skipped"] * 2 + ["run done"]

    @pytest.mark.slow
    def test_a_run_that_stands_still_is_told_of(self, documents, tmp_path, train_main, monkeypatch, capsys):
        step = Trainer.train_step

        def slow(trainer):
            time.sleep(1.0 if trainer.state.step == 0 else 0.0)
            step(trainer)

        monkeypatch.setattr(Trainer, "train_step", slow)
        # the run begins with an evaluation
        monkeypatch.setattr("recurrent_bart.training.session.STALL_SECONDS", 0.9)
        assert train_main(flags(documents, tmp_path / "run", max_steps=2, wandb_mode="offline")) == 0
        (file,) = wandb_files(tmp_path / "run")
        alerts = [record.alert for record in wandb_records(file) if record.WhichOneof("record_type") == "alert"]
        assert "run stalls" in [alert.title for alert in alerts]
        assert "after step 0" in alerts[0].text
        assert "warning: no step for" in capsys.readouterr().out


def _spoil(module, arguments, output):
    output.loss = output.loss * math.nan
    return output


@pytest.mark.slow
def test_a_recurrence_that_cannot_be_looked_at_stops_nothing(documents, tmp_path, train_main, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("recurrent_bart.training.probing.recurrence_metrics", fail)
    # the fixture of short runs disables it
    monkeypatch.setattr("recurrent_bart.training.session.probe_recurrence", probe_recurrence)
    assert train_main(flags(documents, tmp_path / "run", max_steps=2)) == 0
    assert "warning: the metrics of the recurrence could not be computed: out of memory" in "".join(capfd.readouterr())


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_damaged_file_of_the_run_is_no_fault(tmp_path, content):
    """Other ranks wait for the id, so no error is raised."""
    folder = RunFolder(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run.json").write_text(content)
    identity, problem = _first_id(folder, None)
    assert identity == ""
    assert problem
