"""Tests of the service as a process: it is killed and goes on; slow and endless clients harm nobody."""

import contextlib
import signal
import socket
import threading
import time

import pytest

from recurrent_bart.inference.summarizer import Summarizer
from runs import WORDS, write_run_with_model
from serving.server import Server

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
TEXT = " ".join(WORDS * 12)
LIMITS = ("--text_bytes", "100000", "--body_seconds", "2")


@pytest.mark.slow
def test_a_killed_server_goes_on_and_bad_clients_harm_nobody(tmp_path):
    run = write_run_with_model(tmp_path / "run", [TEXT], {"data": {"max_target_length": 6}})
    server = Server(run.model, tmp_path / "sessions", *LIMITS)
    ids = [server.ask("POST", "/v1/sessions")["id"] for _ in range(3)]
    for id in ids:
        server.ask("POST", f"/v1/sessions/{id}/text?position=0", TEXT[:100])
    assert server.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    server = Server(run.model, tmp_path / "sessions", *LIMITS)
    try:
        expected = Summarizer.from_pretrained(run.model)(TEXT).text
        for id in ids:
            # the client had no answer for the first piece, and sends it again
            server.ask("POST", f"/v1/sessions/{id}/text?position=0", TEXT[:100])
            assert server.ask("POST", f"/v1/sessions/{id}/text?position=100", TEXT[100:])["n_characters"] == len(TEXT)
            assert server.ask("GET", f"/v1/sessions/{id}/summary")["summary"] == expected
        slow = server.connect("Content-Length: 50")
        huge = server.connect("Content-Length: 100000000")
        assert b" 413 " in huge.recv(100)
        endless = server.connect("Transfer-Encoding: chunked")
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                endless.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert b" 413 " in endless.recv(100)
        begin = time.monotonic()
        assert server.ask("POST", "/v1/summaries", TEXT)["summary"] == expected
        assert time.monotonic() - begin < 2
        assert b" 408 " in slow.recv(100)
    finally:
        code, printed = server.stop(signal.SIGTERM)
    assert code in (0, -signal.SIGTERM)
    assert WORDS[0] not in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_clients_without_a_token_leave_the_service_to_others(tmp_path):
    run = write_run_with_model(tmp_path / "run", [TEXT], {"data": {"max_target_length": 6}})
    (tmp_path / "token").write_text("secret")
    flags = ("--token_file", tmp_path / "token", "--connection_seconds", "5")
    server = Server(run.model, tmp_path / "sessions", *flags, n_files=256)
    try:
        begin = time.monotonic()
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(600)]
        # a connection that finds no place in the system's queue tries again after a second
        assert time.monotonic() - begin < 10
        assert seconds_of_health(server) < 2
        # the answer comes before the end of the body; more chunks are not read
        endless = server.connect("Transfer-Encoding: chunked")
        sent = threading.Thread(target=send_for_ever, args=(endless,))
        sent.start()
        for _ in range(5):
            assert seconds_of_health(server) < 2
        sent.join(20)
        assert not sent.is_alive()
        time.sleep(6)
        for connection in silent:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert seconds_of_health(server) < 2
    finally:
        _, printed = server.stop(signal.SIGTERM)
    assert printed == ""


def seconds_of_health(server):
    begin = time.monotonic()
    assert server.ask("GET", "/health") == {"status": "ok"}
    return time.monotonic() - begin


def send_for_ever(connection):
    """Send chunks of one byte until the service closes the connection."""
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(b"1\r\nx\r\n" * 1000)
