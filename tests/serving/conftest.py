"""Fixtures of the service's tests: a tiny model and a started service."""

import pytest

from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.inference.summarizer import Summarizer
from summaries import HOW, WORDS, writing_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=400)


@pytest.fixture
def summarizer(tokenizer):
    return Summarizer(writing_model(tokenizer, decoder_context="all"), tokenizer, **HOW)


@pytest.fixture(scope="module")
def shared_service(tokenizer, tmp_path_factory):
    """Return a function that gives a service with these limits; the tests of a module share services."""
    from fastapi.testclient import TestClient

    from recurrent_bart.serving.app import build_app
    from recurrent_bart.serving.settings import Settings

    summarizer = Summarizer(writing_model(tokenizer, decoder_context="all"), tokenizer, **HOW)
    started = {}

    def service(**limits):
        key = repr(limits)
        if key not in started:
            folder = tmp_path_factory.mktemp("sessions")
            app = build_app(summarizer, Settings(folder, **limits))
            client = TestClient(app, raise_server_exceptions=False, headers={"content-type": "text/plain"})
            started[key] = client.__enter__()
            client.sessions_folder = folder
        return started[key]

    yield service
    for client in started.values():
        client.__exit__(None, None, None)


@pytest.fixture
def serve(summarizer, tmp_path):
    """Return a function that starts the service with these limits; the test's end stops the last one."""
    from fastapi.testclient import TestClient

    from recurrent_bart.serving.app import build_app
    from recurrent_bart.serving.settings import Settings

    started = []

    def start(used=summarizer, **limits):
        while started:
            started.pop().__exit__(None, None, None)
        app = build_app(used, Settings(tmp_path / "sessions", **limits))
        client = TestClient(app, raise_server_exceptions=False, headers={"content-type": "text/plain"})
        started.append(client.__enter__())
        return client

    yield start
    for client in started:
        client.__exit__(None, None, None)
