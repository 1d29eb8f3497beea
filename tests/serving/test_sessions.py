"""Sessions of the service: lost answers, counts after a restart, line ends, and their time to live."""

import io
import os
import time

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from recurrent_bart.inference.input_texts import text_pieces
from recurrent_bart.inference.reading_session import ReadingSession
from recurrent_bart.serving import service
from recurrent_bart.serving.sessions import N_SECTIONS_KEPT
from summaries import WORDS

TEXT = " ".join(WORDS[:40])


def new(client):
    return client.post("/v1/sessions").json()["id"]


def test_a_lost_summary_of_a_section_can_be_read_again(serve):
    client = serve()
    id, sections = new(client), []
    for number, text in enumerate(WORDS[:3], 1):
        client.post(f"/v1/sessions/{id}/text", content=text)
        sections.append(client.post(f"/v1/sessions/{id}/sections?number={number}").json())
        assert sections[-1]["number"] == number
        # the client had no answer, and asks again
        assert client.post(f"/v1/sessions/{id}/sections?number={number}").json() == sections[-1]
        client = serve()
        assert client.get(f"/v1/sessions/{id}/sections").json() == {
            "id": id,
            "n_sections": number,
            "sections": sections,
        }
    assert client.get(f"/v1/sessions/{id}").json()["n_sections"] == 3
    gap = client.post(f"/v1/sessions/{id}/sections?number=5")
    assert gap.status_code == 409
    assert "the session has 3 sections" in gap.json()["detail"]


@pytest.mark.slow
def test_the_last_sections_are_kept(serve):
    client = serve()
    id, n_sections = new(client), N_SECTIONS_KEPT + 2
    for _ in range(n_sections):
        client.post(f"/v1/sessions/{id}/text", content=WORDS[0])
        assert client.post(f"/v1/sessions/{id}/sections?max_new_tokens=1&min_new_tokens=1").status_code == 200
    numbers = [section["number"] for section in client.get(f"/v1/sessions/{id}/sections").json()["sections"]]
    assert numbers == list(range(3, n_sections + 1))
    assert client.post(f"/v1/sessions/{id}/sections?number=2").status_code == 409


def test_settings_of_generation_change_the_summary_of_a_section(serve):
    client = serve()
    texts = []
    for query in ("", "?max_new_tokens=3&min_new_tokens=3"):
        id = new(client)
        client.post(f"/v1/sessions/{id}/text", content=TEXT)
        texts.append(client.post(f"/v1/sessions/{id}/sections{query}").json()["summary"])
    assert len(texts[1]) < len(texts[0])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"n_cached_sessions": 1}], ids=["restart", "eviction"])
def test_counts_are_of_the_whole_text_after_a_restart_and_an_eviction(serve, summarizer, settings):
    client = serve(**settings)
    id = new(client)
    for start in range(0, len(TEXT), 100):
        client.post(f"/v1/sessions/{id}/text", content=TEXT[start : start + 100])
        if settings:
            new(client)
        else:
            client = serve()
    expected, answer = summarizer(TEXT), client.get(f"/v1/sessions/{id}/summary").json()
    assert (answer["summary"], answer["n_tokens"], answer["n_segments"]) == (
        expected.text,
        expected.n_tokens,
        expected.n_segments,
    )
    section = client.post(f"/v1/sessions/{id}/sections").json()
    assert (section["n_tokens"], section["n_segments"]) == (expected.n_tokens, expected.n_segments)


def test_a_state_of_the_command_line_goes_on_at_its_number_of_characters(serve, summarizer, tmp_path):
    reading = summarizer.open()
    for _ in reading.reader.feed(TEXT[:200]):
        pass
    reading.reader.save(tmp_path / "state")
    client = serve()
    id = new(client)
    put = client.put(f"/v1/sessions/{id}/state", content=(tmp_path / "state").read_bytes())
    assert put.json() == {"id": id, "n_characters": 200, "n_read": 200, "n_sections": 0}
    assert client.post(f"/v1/sessions/{id}/text?position=190", content=TEXT[190:]).json()["n_characters"] == len(TEXT)
    assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == summarizer(TEXT).text


LINES = "\ufeff" + "\r\n".join(WORDS[:5]) + "\r" + "\n\r\n\r\r\n" + WORDS[6] + "\r\n"


@pytest.mark.slow
def test_line_ends_and_a_byte_order_mark_are_read_as_the_command_line_reads_them(serve, summarizer):
    client = serve()
    plain = "".join(text_pieces(io.BytesIO(LINES.encode()), "file"))
    assert "\r" not in plain
    expected = summarizer(plain)
    assert expected != summarizer(LINES)
    asked = {"text": LINES}, {"content-type": "application/json"}
    answers = [
        client.post("/v1/summaries", content=LINES.encode()).json(),
        client.post("/v1/summaries", json=asked[0], headers=asked[1]).json(),
    ]
    for size in (1, 7, 1000):
        id = new(client)
        for start in range(0, len(LINES), size):
            client.post(f"/v1/sessions/{id}/text?position={start}", content=LINES[start : start + size].encode())
            if size == 7:
                client = serve()
        shown = client.get(f"/v1/sessions/{id}").json()
        assert (shown["n_characters"], shown["n_read"]) == (len(LINES), len(plain))
        answers.append(client.get(f"/v1/sessions/{id}/summary").json())
    assert [(it["summary"], it["n_tokens"]) for it in answers] == [(expected.text, expected.n_tokens)] * 5


@pytest.mark.slow
def test_old_sessions_go_without_a_request_except_those_in_use(serve, summarizer, monkeypatch, tmp_path):
    monkeypatch.setattr(service, "DELETE_EVERY_SECONDS", 0.1)
    client = serve(session_seconds=4.0)
    old, used = new(client), new(client)
    summarize = ReadingSession.summary_in_steps

    def slow(self):
        for _ in range(50):
            time.sleep(0.1)
            yield
        return (yield from summarize(self))

    client.post(f"/v1/sessions/{used}/text", content=TEXT)
    monkeypatch.setattr(ReadingSession, "summary_in_steps", slow)
    assert client.get(f"/v1/sessions/{used}/summary").status_code == 200
    assert os.listdir(tmp_path / "sessions").count(f"{old}.safetensors") == 0
    end = time.monotonic() + 60
    while os.listdir(tmp_path / "sessions") != [".lock"]:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_session_is_on_disk_before_its_answer(serve, monkeypatch):
    client, synced = serve(), []
    fsync = os.fsync
    monkeypatch.setattr(
        "recurrent_bart.files.os.fsync",
        lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)),
    )
    id = new(client)
    assert any(path.endswith(f"{id}.draft") for path in synced)
    assert synced[-1].endswith("sessions")
