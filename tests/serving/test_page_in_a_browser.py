"""Page of the service in a real browser, end to end on a tiny model."""

import json
import os
import threading
import time
import urllib.request

import matplotlib.image
import pytest

from browser import Tab
from cited_documents import SENTENCES, TEXT, citing_summarizer
from launching import free_port
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.serving.settings import Settings

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
import uvicorn

from recurrent_bart.serving.app import build_app

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("_browser")]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\n"
IDLE = "document.getElementById('stop').hidden"
# set to a folder to look at the screenshots by eye
PICTURES = os.environ.get("PAGE_PICTURES")


@pytest.fixture(scope="module")
def summarizer():
    return citing_summarizer(train_tokenizer(SENTENCES * 30, vocab_size=420), decoder_context="section")


@pytest.fixture
def start(summarizer, tmp_path):
    """Return a function that starts the service with these limits, and returns its address."""
    servers = []

    def start(**limits):
        port = free_port()
        app = build_app(summarizer, Settings(tmp_path / "sessions", **limits))
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.05)
        return f"http://127.0.0.1:{port}/"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def tab(tmp_path):
    tab = Tab(tmp_path)
    yield tab
    tab.close()


def texts(tab, selector):
    return tab.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map((it) => it.textContent)")


def photograph(tab, tmp_path, name):
    """Take a screenshot, and return its pixels."""
    path = tmp_path / f"{name}.png"
    tab.photograph(path)
    if PICTURES:
        tab.photograph(os.path.join(PICTURES, f"{name}.png"))
    return matplotlib.image.imread(path)


def test_a_pasted_document_is_summarised_and_a_sentence_shows_its_passage(start, tab, summarizer, tmp_path):
    # time for the page to show each word
    handle = summarizer.model.lm_head.register_forward_hook(lambda *_: time.sleep(0.05))
    tab.visit(start())
    text = HOSTILE + TEXT
    tab.ask(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelector('.text')?.textContent ?? ''))"
        ".observe(document.getElementById('summaries'), {childList: true, subtree: true, characterData: true})"
    )
    tab.write("#text", text)
    tab.press("Enter", 13, modifiers=2)
    tab.wait(f"{IDLE} && document.querySelectorAll('.sentence').length > 0")
    handle.remove()
    # the page ends a piece with a line end
    expected = summarizer(text + "\n")
    assert texts(tab, ".text") == [expected.text]
    parts = {part for part in tab.ask("seen") if part and part != expected.text}
    assert len(parts) > 2
    assert all(expected.text.startswith(part) for part in parts)
    assert "".join(texts(tab, "#source p:not(.quiet)")) == text.replace("\n", "")
    assert tab.ask("document.querySelectorAll('#source img, #source script').length") == 0
    assert texts(tab, "mark") == []
    tab.point(".sentence")
    assert texts(tab, "mark")[0] == SENTENCES[2].strip()
    assert "100 %" in texts(tab, ".cited li")[0]
    light = photograph(tab, tmp_path, "light")
    tab.press("Escape", 27)
    assert texts(tab, "mark") == []
    tab.ask("document.querySelector('.sentence').focus()")
    assert texts(tab, "mark")[0] == SENTENCES[2].strip()
    tab.click("#theme")
    dark = photograph(tab, tmp_path, "dark")
    assert light[5, 5, :3].mean() > 0.9
    assert dark[5, 5, :3].mean() < 0.2
    tab.click("#theme")
    tab.look((390, 844))
    tab.click(".sentence")
    assert texts(tab, "mark")[0] == SENTENCES[2].strip()
    photograph(tab, tmp_path, "phone")
    assert tab.ask("document.documentElement.scrollWidth") == 390
    assert tab.messages == []


def test_a_meeting_in_pieces_has_sections_and_goes_on_from_a_saved_file(start, tab, tmp_path):
    address = start()
    tab.visit(address)
    tab.write("#text", SENTENCES[0])
    tab.click("#add")
    tab.wait(f"{IDLE} && document.querySelectorAll('#source p').length > 1")
    tab.write("#text", SENTENCES[2] + "\n---\n" + SENTENCES[3])
    tab.click("#summarise")
    tab.wait(f"{IDLE} && document.querySelectorAll('#summaries li').length === 2")
    assert texts(tab, "h3") == ["Section 1", "Section 2, so far"]
    assert tab.ask("document.querySelectorAll('#source hr').length") == 1
    tab.click("#end")
    tab.wait(f"{IDLE} && document.querySelectorAll('#source hr').length === 2")
    assert texts(tab, "h3") == ["Section 1", "Section 2"]
    tab.point(".sentence")
    assert texts(tab, "mark") == [SENTENCES[2].strip()]
    summaries, source = texts(tab, ".text"), texts(tab, "#source p:not(.quiet)")
    tab.click("#save")
    saved = tmp_path / "session.safetensors"
    tab.wait(IDLE)
    for _ in range(200):
        if saved.exists():
            break
        time.sleep(0.05)
    tab.visit(address + "?again")
    tab.choose_file("#state", saved)
    tab.wait(f"{IDLE} && document.querySelectorAll('#summaries li').length === 2")
    assert (texts(tab, ".text"), texts(tab, "#source p:not(.quiet)")) == (summaries, source)
    tab.write("#text", f"🙂 {SENTENCES[1]}" + SENTENCES[2])
    tab.click("#summarise")
    tab.wait(f"{IDLE} && document.querySelector('li:nth-child(3) .sentence') !== null")
    tab.point("li:nth-child(3) .sentence")
    # the passage of the new section, behind the text of the file and behind a letter of two units
    assert texts(tab, "mark") == [SENTENCES[2].strip()]
    assert tab.ask("document.querySelector('mark').closest('p') === document.querySelector('#source p:last-of-type')")
    photograph(tab, tmp_path, "sections")
    assert tab.messages == []


def test_errors_are_sentences_and_a_token_is_asked_for(start, tab, tmp_path):
    tab.visit(start(token="secret", text_bytes=1000))
    for given in ("wrong", "secret"):
        if given == "wrong":
            tab.write("#text", TEXT)
            tab.click("#summarise")
        tab.wait("!document.getElementById('token-form').hidden")
        tab.write("#token", given)
        tab.press("Enter", 13)
        if given == "wrong":
            tab.ask("document.getElementById('token-form').requestSubmit()")
            tab.wait("document.getElementById('error').textContent === 'The token is wrong.'")
        else:
            tab.ask("document.getElementById('token-form').requestSubmit()")
    tab.wait(f"{IDLE} && document.querySelectorAll('.sentence').length > 0")
    tab.messages.clear()
    tab.write("#text", TEXT * 20)
    tab.click("#summarise")
    tab.wait("!document.getElementById('error').hidden")
    assert texts(tab, "#error") == [f"The body has {len((TEXT * 20).encode()) + 1} bytes; at most 1000 are allowed."]
    photograph(tab, tmp_path, "error")
    # the first section has arrived, and only the second one is left to send
    tab.ask("document.getElementById('text').value = ''")
    tab.write("#text", f"{SENTENCES[2]}\n---\n{TEXT * 20}")
    tab.click("#summarise")
    tab.wait(
        f"{IDLE} && !document.getElementById('error').hidden && document.querySelectorAll('#source hr').length === 1"
    )
    assert tab.ask("document.getElementById('text').value") == f"{TEXT * 20}\n"
    tab.choose_file("#state", __file__)
    tab.wait("document.getElementById('error').textContent === 'The file is not a saved session.'")


def lose_answer(tab, part):
    """Let the page lose the next answer to an address that contains a text; the service does its work."""
    tab.ask(
        "(() => { const real = window.fetch; window.fetch = async (...given) => { const answer = await real(...given); "
        f"if (!String(given[0]).includes({json.dumps(part)})) return answer; "
        "await answer.text(); window.fetch = real; throw new TypeError('lost') } })()"
    )


def ask(address, path, content=None, method=None):
    request = urllib.request.Request(address + path, content, {"content-type": "text/plain"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_a_piece_whose_answer_was_lost_is_shown_as_read_and_another_text_follows_it(start, tab):
    address = start()
    tab.visit(address)
    lose_answer(tab, "/text")
    tab.write("#text", SENTENCES[0].strip())
    tab.click("#add")
    tab.wait(f"{IDLE} && !document.getElementById('error').hidden")
    assert texts(tab, "#source p:not(.quiet)") == []
    # another text in the box
    tab.ask("document.getElementById('text').value = ''")
    tab.write("#text", SENTENCES[2].strip())
    tab.click("#add")
    tab.wait(f"{IDLE} && document.querySelectorAll('#source p:not(.quiet)').length > 1")
    expected = [SENTENCES[0].strip(), SENTENCES[2].strip()]
    assert texts(tab, "#source p:not(.quiet)") == expected
    id = tab.ask("session.id")
    assert json.loads(ask(address, f"v1/sessions/{id}"))["n_characters"] == sum(map(len, expected)) + 2
    # the same text in the box is not sent twice
    lose_answer(tab, "/text")
    tab.write("#text", SENTENCES[3].strip())
    for _ in range(2):
        tab.click("#add")
        tab.wait(IDLE)
    assert texts(tab, "#source p:not(.quiet)") == [*expected, SENTENCES[3].strip()]
    assert tab.ask("document.getElementById('text').value") == ""
    tab.click("#summarise")
    tab.wait(f"{IDLE} && document.querySelector('.sentence') !== null")


def test_a_section_whose_answer_was_lost_is_ended_once(start, tab):
    address = start()
    tab.visit(address)
    tab.write("#text", SENTENCES[0].strip())
    lose_answer(tab, "/sections")
    tab.click("#end")
    tab.wait(f"{IDLE} && !document.getElementById('error').hidden")
    tab.write("#text", SENTENCES[2].strip())
    tab.click("#add")
    tab.wait(f"{IDLE} && document.querySelectorAll('#source p:not(.quiet)').length > 1")
    assert texts(tab, "h3") == ["Section 1"]
    assert tab.ask("document.querySelector('#source hr').previousSibling.textContent") == SENTENCES[0].strip()
    (section,) = json.loads(ask(address, f"v1/sessions/{tab.ask('session.id')}/sections"))["sections"]
    assert texts(tab, ".text") == [section["summary"]]


def test_citations_of_a_session_that_another_program_saved_count_characters_as_they_were_read(start, tab, tmp_path):
    address = start()
    id = json.loads(ask(address, "v1/sessions", b""))["id"]
    ask(address, f"v1/sessions/{id}/text", f"\ufeff{SENTENCES[0].strip()}\r\n{SENTENCES[1].strip()}\r\n".encode())
    ask(address, f"v1/sessions/{id}/sections", b"")
    (tmp_path / "state.safetensors").write_bytes(ask(address, f"v1/sessions/{id}/state"))
    tab.visit(address)
    tab.choose_file("#state", tmp_path / "state.safetensors")
    tab.wait(f"{IDLE} && session.id !== null")
    tab.write("#text", SENTENCES[2].strip())
    tab.click("#summarise")
    tab.wait(f"{IDLE} && document.querySelector('.sentence') !== null")
    tab.point(".sentence")
    assert texts(tab, "mark") == [SENTENCES[2].strip()]
