"""Description of the service's requests, for programs and for people."""

import re

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from summaries import WORDS

OPTIONS = {
    "num_beams",
    "max_new_tokens",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "length_penalty",
    "repetition_penalty",
}
WRITING = {"stream", "citations"}


def names(operation):
    return {item["name"] for item in operation["parameters"]}


def test_bodies_options_and_answers_are_described(serve):
    paths = serve().get("/openapi.json").json()["paths"]
    summaries, text = paths["/v1/summaries"]["post"], paths["/v1/sessions/{id}/text"]["post"]
    for operation, options in ((summaries, OPTIONS | WRITING | {"query"}), (text, {"position"})):
        content = operation["requestBody"]["content"]
        assert content.keys() == {"text/plain", "application/json"}
        assert content["application/json"]["schema"]["properties"].keys() == {"text", *options}
    assert names(summaries) == OPTIONS | WRITING | {"query"}
    assert names(text) == {"id", "position"}
    assert names(paths["/v1/sessions/{id}/sections"]["post"]) == OPTIONS | WRITING | {"id", "number"}
    assert names(paths["/v1/sessions/{id}/summary"]["get"]) == OPTIONS | WRITING | {"id"}
    begin = paths["/v1/sessions"]["post"]
    assert names(begin) == {"query"}
    assert begin["requestBody"]["content"]["application/json"]["schema"]["properties"].keys() == {"query"}
    assert "application/octet-stream" in paths["/v1/sessions/{id}/state"]["put"]["requestBody"]["content"]
    assert (
        "sections"
        in paths["/v1/sessions/{id}/sections"]["get"]["responses"]["200"]["content"]["application/json"]["schema"][
            "$ref"
        ].lower()
    )
    for path, operations in paths.items():
        for operation in operations.values():
            assert operation["description"], path


def test_the_page_of_requests_needs_no_network(serve):
    client = serve()
    page = client.get("/docs").text
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in page
    assert "num_beams" in page
    assert "application/octet-stream" in page
    assert client.get("/redoc").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "query", "allowed"),
    [
        ("POST", "/v1/summaries", "position=1", "stream"),
        ("GET", "/v1/sessions/ID/summary", "position=1", "stream"),
        ("POST", "/v1/sessions/ID/text", "num_beams=2", "position"),
        ("POST", "/v1/sessions/ID/text", "stream=true", "position"),
        ("POST", "/v1/sessions/ID/text", "citations=true", "position"),
        ("POST", "/v1/sessions/ID/sections", "position=1", "number"),
        ("POST", "/v1/sessions/ID/sections", "citations=maybe", "citations must be true or false"),
        ("POST", "/v1/sessions/ID/text", "query=a", "POST /v1/sessions?query="),
        ("POST", "/v1/sessions/ID/sections", "query=a", "POST /v1/sessions?query="),
        ("POST", "/v1/sessions/ID/sections", "num_beams=99", "num_beams must be a number from 1 to 8"),
        ("GET", "/v1/sessions/ID/sections", "number=1", "none"),
        ("GET", "/v1/sessions/ID", "stream=true", "none"),
        ("GET", "/v1/sessions/ID/state", "position=1", "none"),
        ("PUT", "/v1/sessions/ID/state", "position=1", "none"),
        ("DELETE", "/v1/sessions/ID", "x=1", "none"),
        ("POST", "/v1/sessions", "num_beams=2", "query"),
    ],
)
def test_an_option_that_a_request_does_not_have_is_refused(shared_service, method, path, query, allowed):
    client = shared_service()
    id = client.post("/v1/sessions").json()["id"]
    answer = client.request(method, f"{path.replace('ID', id)}?{query}", content=WORDS[0])
    assert answer.status_code == 400
    assert allowed in answer.json()["detail"]
    assert client.get(f"/v1/sessions/{id}").json()["n_characters"] == 0


def test_metrics_have_types_and_honest_names(serve):
    client = serve()
    for path in ("/v1/summaries", "/v1/summaries?stream=true"):
        client.post(path, content=WORDS[0])
    n_tokens = client.post("/v1/summaries", content=WORDS[0]).json()["n_tokens"]
    lines = client.get("/metrics").text.splitlines()
    assert "recurrent_bart_summaries_total 3" in lines
    assert f"recurrent_bart_summary_source_tokens_total {3 * n_tokens}" in lines
    described = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    values = {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}
    assert {name.removesuffix("_sum").removesuffix("_count") for name in values} == described


@pytest.mark.parametrize(("value", "status"), [(0, 200), (0.0, 200), (0.9, 400)])
def test_a_position_is_a_whole_number(shared_service, value, status):
    client = shared_service()
    id = client.post("/v1/sessions").json()["id"]
    given, kind = {"text": WORDS[0], "position": value}, {"content-type": "application/json"}
    assert client.post(f"/v1/sessions/{id}/text", json=given, headers=kind).status_code == status
