"""Statuses that OpenAPI lists for each route, and a request that gives each of them."""

import shutil

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from recurrent_bart.serving.metrics import Metrics
from recurrent_bart.serving.model_worker import ModelWorker
from recurrent_bart.serving.sessions import Sessions
from summaries import WORDS

SESSION = "/v1/sessions/{id}"
# errors of each route
STATUSES = {
    ("GET", "/health"): {403, 503},
    ("GET", "/metrics"): {401, 403, 500, 503},
    ("POST", "/v1/summaries"): {400, 401, 403, 408, 413, 415, 500, 503},
    ("POST", "/v1/sessions"): {400, 401, 403, 408, 413, 429, 500, 503},
    ("GET", SESSION): {400, 401, 403, 404, 413, 500, 503},
    ("DELETE", SESSION): {400, 401, 403, 404, 500, 503},
    ("POST", f"{SESSION}/text"): {400, 401, 403, 404, 408, 409, 413, 415, 500, 503},
    ("GET", f"{SESSION}/sections"): {400, 401, 403, 404, 413, 500, 503},
    ("POST", f"{SESSION}/sections"): {400, 401, 403, 404, 409, 413, 500, 503},
    ("GET", f"{SESSION}/summary"): {400, 401, 403, 404, 413, 500, 503},
    ("GET", f"{SESSION}/state"): {400, 401, 403, 404, 500, 503},
    ("PUT", f"{SESSION}/state"): {400, 401, 403, 404, 408, 413, 500, 503},
}
# routes that read a body
WITH_BODY = ("/v1/summaries", "/v1/sessions", f"{SESSION}/text", f"{SESSION}/state")
# settings of the service, and changes of the request, that give a status
PROVOKED = {
    400: ({}, {"query": "x=1"}),
    401: ({"token": "secret"}, {}),
    403: ({"allowed_hosts": ("localhost",)}, {}),
    404: ({}, {"id": "a" * 22}),
    409: ({}, {"query": "position=99"}),
    413: ({"text_bytes": 1, "state_bytes": 1}, {}),
    415: ({}, {"kind": "multipart/form-data; boundary=x"}),
    429: ({"n_sessions": 0}, {}),
    503: ({"n_waiting": 0}, {}),
}


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


@pytest.fixture
def provoke(shared_service, monkeypatch):
    """Return a function that gives the status of a request that is to fail with the given status."""

    def provoke(method, path, status):
        settings, given = PROVOKED.get(status, ({}, {}))
        query = given.get("query", "")
        client, plain = shared_service(**settings), shared_service()
        id = given.get("id")
        if not id:
            # some services refuse to begin a session
            id = plain.post("/v1/sessions").json()["id"]
            (saved,) = plain.sessions_folder.glob(f"{id}*")
            if client is not plain:
                shutil.copy(saved, client.sessions_folder)
        # a new session needs no body
        content = "" if path == "/v1/sessions" and status != 413 else WORDS[0]
        if status == 409 and path.endswith("sections"):
            query = "number=9"
        with monkeypatch.context() as patch:
            if status == 500:
                patch.setattr(ModelWorker, "add", fail(RuntimeError()))
                patch.setattr(Metrics, "text", fail(RuntimeError()))
            if status == 408:
                patch.setattr("recurrent_bart.serving.requests.asyncio.timeout", fail(TimeoutError()))
            if status == 413 and path not in WITH_BODY:
                patch.setattr(Sessions, "find", fail(torch.OutOfMemoryError()))
            if status == 503 and path in ("/health", "/metrics"):
                patch.setattr(ModelWorker, "is_alive", False)
            address = f"{path.format(id=id)}?{query}"
            headers = {"content-type": given.get("kind", "text/plain")}
            return client.request(method, address, content=content, headers=headers).status_code

    return provoke


@pytest.mark.parametrize(("method", "path"), STATUSES)
def test_each_status_that_a_route_lists_is_given(provoke, method, path):
    assert {status: provoke(method, path, status) for status in STATUSES[method, path]} == {
        status: status for status in STATUSES[method, path]
    }


def test_openapi_lists_the_errors_of_each_route_and_the_token(serve):
    content = serve().get("/openapi.json").json()
    found = {
        (method.upper(), path): {int(status) for status in operation["responses"] if status >= "300"}
        for path, operations in content["paths"].items()
        for method, operation in operations.items()
    }
    assert found == STATUSES
    assert content["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, operations in content["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path != "/health")
