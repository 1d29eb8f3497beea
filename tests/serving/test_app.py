"""Tests of the service: summaries, sessions that survive, limits, and hostile input."""

import concurrent.futures
import io
import json
import os
import time

import pytest
import torch
from safetensors.torch import load, load_file, save

from recurrent_bart.inference.reading_session import ReadingSession, Summary
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.settings import Settings
from summaries import HOW, WORDS, writing_model

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from recurrent_bart.serving.app import build_app

TEXT = " ".join(WORDS[:24])


def read_events(response):
    blocks = [block.splitlines() for block in response.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.mark.slow
def test_a_text_or_json_or_a_stream_gives_the_summary(serve, summarizer):
    client, expected = serve(), summarizer(TEXT)
    answer = client.post("/v1/summaries", content=TEXT).json()
    assert answer["summary"] == expected.text
    assert (answer["n_tokens"], answer["n_segments"]) == (expected.n_tokens, expected.n_segments)
    given = {"text": TEXT, "num_beams": 2}
    beams = client.post("/v1/summaries", json=given, headers={"content-type": "application/json"}).json()
    assert beams["summary"] == Summarizer(summarizer.model, summarizer.tokenizer, **HOW, num_beams=2)(TEXT).text
    events = read_events(client.post("/v1/summaries?stream=true", content=TEXT))
    assert len(events) > 2
    assert "".join(data["text"] for name, data in events if name == "text") == expected.text
    assert events[-1] == ("end", {"summary": expected.text})


def test_a_text_and_a_session_may_have_a_question(serve, tokenizer):
    model = writing_model(tokenizer, decoder_context="all", segment_size=16)
    asking = Summarizer(model, tokenizer, **HOW)
    client = serve(asking)
    expected = asking(TEXT, "the list")
    assert expected.text != asking(TEXT).text
    assert client.post("/v1/summaries?query=the+list", content=TEXT).json()["summary"] == expected.text
    events = read_events(client.post("/v1/summaries?stream=true&query=the+list", content=TEXT))
    assert events[-1] == ("end", {"summary": expected.text})
    id = client.post("/v1/sessions?query=the+list").json()["id"]
    client = serve(asking)
    client.post(f"/v1/sessions/{id}/text", content=TEXT)
    assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == expected.text
    refused = client.get(f"/v1/sessions/{id}/summary?query=other")
    assert (refused.status_code, "POST /v1/sessions" in refused.json()["detail"]) == (400, True)
    for path in ("text", "sections"):
        refused = client.post(f"/v1/sessions/{id}/{path}?query=other", content=TEXT)
        assert (refused.status_code, "POST /v1/sessions" in refused.json()["detail"]) == (400, True)
    for path in (f"/v1/summaries?query={TEXT}", f"/v1/sessions?query={TEXT}"):
        refused = client.post(path, content="" if "sessions" in path else TEXT)
        assert refused.status_code == 400
        assert "no room for text" in refused.json()["detail"]
        assert TEXT[:20] not in refused.json()["detail"]


def test_a_session_takes_its_question_from_a_json_body_and_keeps_it(serve, tokenizer):
    model = writing_model(tokenizer, decoder_context="all", segment_size=16)
    asking = Summarizer(model, tokenizer, query="index", **HOW)
    client = serve(asking)
    ids = {"": client.post("/v1/sessions", json={"query": ""}).json()["id"]}
    ids["the list"] = client.post("/v1/sessions", json={"query": "the list"}).json()["id"]
    ids["index"] = client.post("/v1/sessions", json={}).json()["id"]
    # the new server has no session in memory
    client = serve(asking)
    for query, id in ids.items():
        assert client.post(f"/v1/sessions/{id}/text", content=TEXT).status_code == 200
        assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == asking(TEXT, query).text
    for body in (b'{"query": 3}', b'{"queries": "a"}', b"[1]", b"{"):
        assert client.post("/v1/sessions", content=body).status_code == 400
    assert client.post("/v1/sessions?num_beams=2").status_code == 400


@pytest.mark.slow
def test_fifty_sessions_at_once_equal_the_whole_text(serve, summarizer):
    client = serve(n_cached_sessions=7)
    texts = [" ".join(WORDS[start : start + 4 + start % 9]) for start in range(50)]

    def read(text):
        id = client.post("/v1/sessions").json()["id"]
        for start in range(0, len(text), 37):
            assert client.post(f"/v1/sessions/{id}/text", content=text[start : start + 37]).status_code == 200
        return client.get(f"/v1/sessions/{id}/summary").json()["summary"]

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        found = list(pool.map(read, texts))
    assert found == [summary.text for summary in summarizer(texts)]
    assert len(set(found)) > 10


def test_texts_that_wait_are_read_together(serve, summarizer, monkeypatch):
    client, sizes, summarize = serve(), [], Summarizer.summarize_in_steps

    def note(self, texts):
        sizes.append(len(texts))
        time.sleep(0.3)
        yield from summarize(self, texts)

    texts = [*(WORDS[:6]), "\u00ad"]
    expected = [summarizer(text).text for text in texts[:-1]]
    monkeypatch.setattr(Summarizer, "summarize_in_steps", note)
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(lambda text: client.post("/v1/summaries", content=text), texts))
    assert [answer.json().get("summary") for answer in answers[:-1]] == expected
    assert max(sizes) > 1


def test_a_session_goes_on_after_a_restart_and_reads_no_piece_twice(serve, summarizer):
    client = serve()
    id = client.post("/v1/sessions").json()["id"]
    for position in (0, 0, 60, 30):
        sent = client.post(f"/v1/sessions/{id}/text?position={position}", content=TEXT[position : position + 60])
        assert sent.json()["n_characters"] == max(60, position + 60) if position != 30 else 120
    assert client.post(f"/v1/sessions/{id}/text?position=121", content="x").status_code == 409
    client = serve()
    assert client.get(f"/v1/sessions/{id}").json()["n_characters"] == 120
    assert client.post(f"/v1/sessions/{id}/text", content=TEXT[120:]).json()["n_characters"] == len(TEXT)
    assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == summarizer(TEXT).text
    events = read_events(client.get(f"/v1/sessions/{id}/summary?stream=true"))
    assert events[-1][1] == {"summary": summarizer(TEXT).text}
    assert client.delete(f"/v1/sessions/{id}").status_code == 204
    assert client.get(f"/v1/sessions/{id}").status_code == 404


def test_a_section_ends_with_its_summary(serve, summarizer):
    client, session = serve(), summarizer.open()
    id = client.post("/v1/sessions").json()["id"]
    for text in WORDS[:2]:
        client.post(f"/v1/sessions/{id}/text", content=text)
        session.add(text)
        assert client.post(f"/v1/sessions/{id}/sections").json()["summary"] == session.end_section().text
    assert client.post(f"/v1/sessions/{id}/sections").status_code == 400


def test_old_sessions_are_deleted_and_their_number_is_limited(serve, tmp_path):
    client = serve(n_sessions=2, session_seconds=100)
    ids = [client.post("/v1/sessions").json()["id"] for _ in range(2)]
    full = client.post("/v1/sessions")
    assert (full.status_code, full.headers["retry-after"]) == (429, "5")
    os.utime(tmp_path / "sessions" / f"{ids[0]}.safetensors", (0, 0))
    assert client.get(f"/v1/sessions/{ids[0]}").status_code == 404
    assert client.post("/v1/sessions").status_code == 201
    assert (tmp_path / "sessions").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_state_moves_to_another_session_and_a_strangers_is_refused(serve, summarizer, tmp_path, capsys):
    client = serve(state_bytes=2**20)
    first, second = (client.post("/v1/sessions").json()["id"] for _ in range(2))
    client.post(f"/v1/sessions/{first}/text", content=TEXT)
    state = client.get(f"/v1/sessions/{first}/state").content
    assert client.put(f"/v1/sessions/{second}/state", content=state).json()["n_characters"] == len(TEXT)
    summary = client.get(f"/v1/sessions/{second}/summary").json()["summary"]
    assert summary == summarizer(TEXT).text
    for content, status in strangers(state):
        answer = client.put(f"/v1/sessions/{second}/state", content=content)
        assert answer.status_code == status, answer.text
        assert str(tmp_path) not in answer.text
    assert client.get(f"/v1/sessions/{second}/summary").json()["summary"] == summary
    assert sorted(os.listdir(tmp_path / "sessions")) == sorted(
        [".lock", f"{first}.safetensors", f"{second}.safetensors"]
    )
    assert "fault" not in capsys.readouterr().err


def strangers(state):
    """Yield files that are no state of the model, with the status of the answer."""
    tensors, size = load(state), int.from_bytes(state[:8], "little")
    metadata = json.loads(state[8 : 8 + size])["__metadata__"]
    pickled = io.BytesIO()
    torch.save({"ids": torch.zeros(1)}, pickled)
    yield from ((content, 400) for content in (b"", b"x" * 100, state[:-9], pickled.getvalue()))
    yield b"x" * (2**20 + 1), 413
    for name, tensor in tensors.items():
        for changed in (tensor[..., None], tensor.to(torch.int32), None, tensor.repeat(2, *[1] * (tensor.dim() - 1))):
            others = {key: value for key, value in tensors.items() if key != name}
            # other ids are another text, and no stranger's
            if (
                name in ("ids", "overlap")
                and changed is not None
                and changed.dtype == tensor.dtype
                and changed.dim() == 1
            ):
                continue
            yield save(others | ({} if changed is None else {name: changed.contiguous()}), metadata), 400
    yield save({**tensors, "ids": torch.tensor([10**6])}, metadata), 400
    yield save({**tensors, "state.memory": tensors["state.memory"] * torch.nan}, metadata), 400
    yield save({**tensors, "state.more": torch.zeros(1)}, metadata), 400
    for name, value in (("notes", "[]"), ("notes", '{"n_characters": "x"}'), ("reader", "x"), ("format", "1")):
        yield save(tensors, metadata | {name: value}), 400
    yield save(tensors, {name: value for name, value in metadata.items() if name != "text"}), 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "kind", "query", "status"),
    [
        (b"\xff\xfe\x00", "text/plain", "", 400),
        (b"", "text/plain", "", 400),
        (b" \n ", "text/plain", "", 400),
        (b"x" * 2000, "text/plain", "", 413),
        (b"{", "application/json", "", 400),
        (b"[]", "application/json", "", 400),
        (b'{"text": 1}', "application/json", "", 400),
        (b'{"text": "\\ud800 a"}', "application/json", "", 400),
        (b"[" * 900, "application/json", "", 400),
        (b"--x", "multipart/form-data; boundary=x", "", 415),
        (b"a", "text/plain", "?num_beams=99", 400),
        (b"a", "text/plain", "?num_beams=x", 400),
        (b"a", "text/plain", "?max_new_tokens=1000", 400),
        (b"a", "text/plain", "?length_penalty=nan", 400),
        (b"a", "text/plain", "?stream=maybe", 400),
        (b"a", "text/plain", "?trust_remote_code=true", 400),
    ],
)
def test_a_wrong_request_has_a_clear_status_and_stops_nothing(serve, content, kind, query, status):
    client = serve(text_bytes=1000)
    answer = client.post(f"/v1/summaries{query}", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.json()["detail"]
    assert client.post("/v1/summaries", content=WORDS[0]).status_code == 200


@pytest.mark.parametrize("id", ["..", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a" * 22, "a" * 21 + ".", "\u00e9" * 22])
def test_an_id_is_never_a_path(serve, id):
    client = serve()
    for method, path in (("GET", ""), ("POST", "/text"), ("GET", "/state"), ("PUT", "/state"), ("DELETE", "")):
        assert client.request(method, f"/v1/sessions/{id}{path}", content=b"x").status_code in (404, 405)


def test_only_the_token_opens_and_other_sites_are_refused(serve):
    client = serve(token="secret")
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s\u00e9".encode()}):
        for path in ("/v1/summaries", "/v1/sessions"):
            answer = client.post(path, content=WORDS[0], headers=given)
            assert answer.status_code == 401
            assert "secret" not in answer.text
        assert client.get("/metrics", headers=given).status_code == 401
    right = {"authorization": "Bearer secret"}
    assert client.post("/v1/summaries", content=WORDS[0], headers=right).status_code == 200
    elsewhere = right | {"origin": "http://elsewhere.example"}
    assert client.post("/v1/sessions", headers=elsewhere).status_code == 403
    assert client.get("/health").json() == {"status": "ok"}


def test_counters_and_no_text_in_logs(serve, capsys, monkeypatch, caplog):
    client = serve()
    client.post("/v1/summaries", content=TEXT)
    client.get("/v1/sessions/none")

    def fail(self, texts):
        raise RuntimeError(texts[0])

    monkeypatch.setattr(Summarizer, "summarize_in_steps", fail)
    broken = client.post("/v1/summaries", content=TEXT)
    assert (broken.status_code, broken.json()) == (500, {"detail": "a fault of the service"})
    metrics = client.get("/metrics").text
    assert 'recurrent_bart_requests_total{route="/v1/summaries",status="200"} 1' in metrics
    assert 'recurrent_bart_requests_total{route="/v1/sessions/{id}",status="404"} 1' in metrics
    assert "recurrent_bart_summaries_total 1" in metrics
    assert "recurrent_bart_sessions 0" in metrics
    printed = capsys.readouterr()
    assert "fault in a request: RuntimeError" in printed.err
    assert WORDS[0] not in printed.out + printed.err + caplog.text


def test_a_fault_in_a_stream_is_an_event_and_its_message_stays_out_of_the_log(serve, capsys, monkeypatch, caplog):
    client = serve()

    def fail(*_, **__):
        yield "a piece"
        raise RuntimeError(TEXT)

    monkeypatch.setattr(ReadingSession, "stream_after", fail)
    events = read_events(client.post("/v1/summaries?stream=true", content=TEXT))
    assert events == [("text", {"text": "a piece"}), ("error", {"detail": "a fault of the service"})]
    printed = capsys.readouterr()
    assert "fault in a stream: RuntimeError" in printed.err
    assert WORDS[0] not in printed.out + printed.err + caplog.text


def test_drafts_of_a_killed_server_are_deleted_and_others_cannot_read_sessions(serve, tmp_path):
    folder = tmp_path / "sessions"
    folder.mkdir(mode=0o755)
    drafts = folder / "a.draft", folder / "b.upload"
    for draft in drafts:
        draft.write_text("text")
    serve()
    assert not any(draft.exists() for draft in drafts)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_more_requests_than_may_wait_are_told_to_come_again(serve, monkeypatch):
    client = serve(n_waiting=1)
    summary = Summary("", 0, 0)
    monkeypatch.setattr(Summarizer, "summarize_in_steps", lambda *_: time.sleep(0.5) or iter([{0: summary}]))
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        paths = [f"/v1/summaries?num_beams={number}" for number in range(1, 6)]
        codes = list(pool.map(lambda path: client.post(path, content="a").status_code, paths))
    assert codes.count(503) >= 2


def test_a_folder_has_one_server(serve, summarizer, tmp_path):
    serve()
    with pytest.raises(ValueError, match="another server uses this folder"):
        build_app(summarizer, Settings(tmp_path / "sessions"))


@pytest.mark.slow
def test_a_write_that_fails_loses_nothing(serve, summarizer, monkeypatch, tmp_path):
    client = serve()
    id = client.post("/v1/sessions").json()["id"]
    client.post(f"/v1/sessions/{id}/text", content=TEXT[:100])
    with monkeypatch.context() as patch:
        patch.setattr("recurrent_bart.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert client.post(f"/v1/sessions/{id}/text", content=TEXT[100:]).status_code == 500
    assert client.get(f"/v1/sessions/{id}").json()["n_characters"] == 100
    assert client.post(f"/v1/sessions/{id}/text?position=100", content=TEXT[100:]).status_code == 200
    assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == summarizer(TEXT).text
    assert "ids" in load_file(tmp_path / "sessions" / f"{id}.safetensors")
