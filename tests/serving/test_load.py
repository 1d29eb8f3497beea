"""Many requests to the service: no error, and memory that does not grow."""

import signal

import pytest

from runs import WORDS, write_run_with_model
from serving.load import run_load
from serving.server import Server

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


@pytest.mark.slow
def test_hundreds_of_requests_have_no_error_and_take_no_more_memory(tmp_path):
    run = write_run_with_model(tmp_path / "run", [" ".join(WORDS * 12)], {"data": {"max_target_length": 6}})
    server = Server(run.model, tmp_path / "sessions")
    try:
        load = run_load(server, n_requests=600, n_between=100)
    finally:
        _, printed = server.stop(signal.SIGTERM)
    assert load.errors == []
    assert len(load.seconds) == 600
    assert "Traceback" not in printed
    # the first requests load libraries and fill caches
    _, first, *_, last = load.resident.values()
    assert last - first < 20
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == [".lock"]
