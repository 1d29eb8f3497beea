"""State files of strangers: they are refused before their texts are tokenized and their tensors are loaded."""

import json
import struct
import time

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.inference import bookmark
from recurrent_bart.inference.saved_state import MOST_CHARACTERS
from recurrent_bart.inference.stream_reader import FORMAT, TextReader

TEXT = "the list of numbers is returned as a list of words " * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 10, vocab_size=300)


@pytest.fixture
def make_reader(make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer)).requires_grad_(False)
    return lambda query="": TextReader(model, tokenizer, query=query)


@pytest.fixture
def state(make_reader, tmp_path):
    """Return the tensors and the metadata of a saved state."""
    reader = make_reader()
    list(reader.feed(TEXT))
    reader.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        return load_file(tmp_path / "state"), file.metadata()


@pytest.mark.parametrize("name", MOST_CHARACTERS)
def test_a_state_with_longer_metadata_than_a_reader_writes_is_refused(make_reader, state, tmp_path, name):
    tensors, metadata = state
    n_characters = MOST_CHARACTERS[name] + 1
    save_file(tensors, tmp_path / "long", metadata | {name: ("the " * n_characters)[:n_characters]})
    begin = time.thread_time()
    with pytest.raises(ValueError, match=f"long: not a saved state: its {name} has {n_characters} characters; at most"):
        make_reader().load(tmp_path / "long")
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize("given", [pytest.param("x", marks=pytest.mark.slow), FORMAT])
def test_many_tensors_are_refused_before_they_are_loaded(make_reader, tmp_path, given):
    head = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(100_000)}
    content = json.dumps({"__metadata__": {"format": given}, **head}).encode()
    (tmp_path / "many").write_bytes(struct.pack("<Q", len(content)) + content)
    reason = "a tensor is missing" if given == FORMAT else "format 'x' found"
    begin = time.thread_time()
    with pytest.raises(ValueError, match=reason):
        make_reader().load(tmp_path / "many")
    assert time.thread_time() - begin < 2


def test_a_state_without_a_tensor_is_refused(make_reader, state, tmp_path):
    tensors, metadata = state
    for name in ("ids", "overlap", "spans"):
        left = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(left, tmp_path / "less", metadata)
        with pytest.raises(ValueError, match="less: not a state of this model: a tensor is missing"):
            make_reader().load(tmp_path / "less")


@pytest.mark.slow
def test_the_longest_text_that_waits_can_be_saved_and_loaded(make_reader, tmp_path, monkeypatch):
    reader, loaded = make_reader(), make_reader()
    # no text is settled
    monkeypatch.setattr(reader.cutter, "_take_settled", lambda mark, size: False)
    list(reader.feed("the" + " " * (bookmark.LONGEST_WORD - 4)))
    # the word after the spaces shows that they can be cut
    list(reader.feed("x" * bookmark.PIECE))
    assert len(reader.bookmark.text) > bookmark.LONGEST_WORD
    reader.save(tmp_path / "state")
    loaded.load(tmp_path / "state")
    assert loaded.bookmark.text == reader.bookmark.text
    assert loaded.n_counted == len(loaded.bookmark.tokens) + len(loaded.cutter.waiting_tokens(loaded.bookmark))


def test_a_question_that_no_state_may_have_is_refused(make_reader):
    with pytest.raises(ValueError, match="--query: it has 65537 characters; at most 65536 are allowed"):
        make_reader(query="a" * 65537)
