"""Tests of the page's files and of the service's citations, without a browser."""

import json
import re

import pytest

from cited_documents import SENTENCES, TEXT, citing_summarizer
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.serving.settings import Settings

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from fastapi.testclient import TestClient

from recurrent_bart.serving.app import build_app
from recurrent_bart.serving.page import FILES, FOLDER


@pytest.fixture
def summarizer():
    return citing_summarizer(train_tokenizer(SENTENCES * 30, vocab_size=420))


@pytest.fixture
def client(summarizer, tmp_path):
    summarizer.citations = False
    app = build_app(summarizer, Settings(tmp_path / "sessions"))
    with TestClient(app, headers={"content-type": "text/plain"}) as client:
        yield client
    summarizer.citations = True


def test_the_page_is_served_with_a_strict_policy_and_without_a_token(summarizer, tmp_path):
    app = build_app(summarizer, Settings(tmp_path / "sessions", token="secret"))
    with TestClient(app) as client:
        for path, (name, kind) in FILES.items():
            answer = client.get(path)
            assert answer.content == (FOLDER / name).read_bytes()
            assert answer.headers["content-type"].startswith(kind)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.post("/v1/sessions").status_code == 401


def test_the_page_needs_no_other_site_and_puts_no_text_into_html():
    for name, _ in FILES.values():
        content = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.findall(r"(?:https?:)?//[a-z]+[.][a-z]", content.replace("http://www.w3.org/2000/svg", ""))
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document[.]write|eval[(]| on[a-z]+=|style=", content)


def test_summaries_sessions_and_sections_have_citations_only_if_asked_for(client, summarizer):
    expected = summarizer.open()
    expected.citations = True
    expected.add(TEXT)
    cited = expected.summary().record()["citations"]
    assert client.post("/v1/summaries?citations=true", content=TEXT).json()["citations"] == cited
    given = {"text": TEXT, "citations": True, "stream": True}
    streamed = client.post("/v1/summaries", json=given, headers={"content-type": "application/json"})
    assert last_event(streamed) == {"summary": expected.summary().text, "citations": cited}
    assert "citations" not in client.post("/v1/summaries", content=TEXT).json()
    id = client.post("/v1/sessions").json()["id"]
    client.post(f"/v1/sessions/{id}/text", content=TEXT)
    address = f"/v1/sessions/{id}/summary"
    assert client.get(f"{address}?citations=true").json()["citations"] == cited
    assert last_event(client.get(f"{address}?citations=true&stream=true"))["citations"] == cited
    assert "citations" not in client.get(address).json()
    assert "citations" not in last_event(client.get(f"{address}?stream=true"))
    section = last_event(client.post(f"/v1/sessions/{id}/sections?citations=true&stream=true"))
    assert section == {"summary": expected.end_section().text, "citations": cited}
    # the notes of a session's file have the citations too
    again = client.post(f"/v1/sessions/{id}/sections?citations=true&number=1").json()
    assert again == client.get(f"/v1/sessions/{id}/sections").json()["sections"][0]
    assert (again["citations"], again["number"]) == (cited, 1)
    assert client.post(f"/v1/sessions/{id}/sections?citations=true").status_code == 400
    client.post(f"/v1/sessions/{id}/text", content=SENTENCES[2])
    passages = client.post(f"/v1/sessions/{id}/sections?citations=true").json()["citations"][0]["passages"]
    assert {(TEXT + SENTENCES[2])[it["start"] : it["end"]] for it in passages} == {SENTENCES[2].strip()}
    wrong = client.post("/v1/summaries?citations=maybe", content=TEXT)
    assert (wrong.status_code, wrong.json()["detail"]) == (400, "citations must be true or false")


def test_a_session_with_a_question_cites_its_text_as_it_was_read(client, summarizer):
    found = []
    for query in ("", "ant"):
        session = summarizer.open(query=query).with_generation({}, citations=True)
        session.add(TEXT)
        found.append(session.summary().record())
    plain, asked = found
    assert asked["n_segments"] > plain["n_segments"]
    id = client.post("/v1/sessions", json={"query": "ant"}, headers={"content-type": "application/json"}).json()["id"]
    sent = "\ufeff" + TEXT.replace("\n", "\r\n")
    added = client.post(f"/v1/sessions/{id}/text", content=sent.encode())
    assert added.json()["n_characters"] == len(sent)
    # positions of citations do not count a byte order mark and carriage returns
    assert client.get(f"/v1/sessions/{id}/summary?citations=true").json() == asked
    given = {"text": sent, "citations": True, "query": "ant"}
    answer = client.post("/v1/summaries", json=given, headers={"content-type": "application/json"})
    assert answer.json() == asked


def last_event(answer):
    return json.loads(answer.text.strip().rsplit("data: ", 1)[1])
