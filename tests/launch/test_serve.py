"""Error messages and settings of `launch/serve.py`."""

import os
import socket

import pytest

from launching import assert_one_error, load_script
from runs import WORDS, write_run_with_model

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def script():
    return load_script("serve")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_run_with_model(tmp_path_factory.mktemp("runs") / "run", [" ".join(WORDS)], {}).model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sessions", "file"], "--sessions file: not a writable folder"),
        (["--sessions", "file/sessions"], "--sessions file/sessions: not a writable folder"),
        (["--sessions", "/proc/sessions"], "--sessions /proc/sessions: not a writable folder"),
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--host", "127.0.0.1", "--port", "USED"], "cannot listen there .*in use"),
        (["--host", "198.51.100.1"], "other machines can reach this address; give --token_file too"),
        (["--host", "no such host", "--token_file", "file"], "cannot listen there"),
        (["--text_characters", "0"], "--text_characters 0: must be above 0"),
        (["--n_cached_sessions", "0"], "--n_cached_sessions 0: must be above 0"),
        (["--bodies_bytes", "1000"], "--bodies_bytes 1000: must be at least --text_bytes 8388608"),
        (["--state_bytes", "1000000000"], "--bodies_bytes 536870912: must be at least --state_bytes 1000000000"),
        (["--token_file", "missing"], "--token_file missing: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(script, model, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("token")
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        flags = [port if flag == "USED" else flag for flag in flags]
        given = [] if "--port" in flags else ["--port", "0"]
        assert script.main(["--model", str(model), *given, *flags]) == 2
    assert_one_error(capsys.readouterr(), message)
    assert os.listdir(tmp_path) == ["file"] or "--sessions" not in flags


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ([], ("localhost", "127.0.0.1", "[::1]", "127.0.0.1")),
        (["--host", "127.0.0.5"], ("localhost", "127.0.0.1", "[::1]", "127.0.0.5")),
        (["--allowed_hosts", "a.example", "b"], ("localhost", "127.0.0.1", "[::1]", "127.0.0.1", "a.example", "b")),
        (["--host", "0.0.0.0"], None),
        (
            ["--host", "0.0.0.0", "--allowed_hosts", "a.example"],
            ("localhost", "127.0.0.1", "[::1]", "0.0.0.0", "a.example"),
        ),
    ],
)
def test_an_address_of_this_machine_alone_answers_only_to_its_names(script, flags, hosts):
    assert script.allowed_hosts(script.parse_arguments(["--model", "x", *flags])) == hosts
