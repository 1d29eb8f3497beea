"""A recorded decoder gives the numbers of a plain one; a graph is played by the work itself, on a processor."""

import pytest
import torch

from recurrent_bart import modeling_decoder, recorded_call
from tiny import batch_of, random_ids, tiny_model


class PlayedGraph:
    """Does again what was recorded, into the tensors that came of it."""

    def __init__(self, work):
        self.work, self.found = work, work()

    def replay(self):
        found = [self.found] if torch.is_tensor(self.found) else self.found
        again = self.work()
        for old, new in zip(found, [again] if torch.is_tensor(again) else again, strict=True):
            if old is not None:
                with torch.no_grad():
                    old.copy_(new)


class FirstGenerator:
    """Of any device."""

    def __getitem__(self, index):
        return self

    def get_offset(self):
        return 0

    def set_offset(self, offset):
        assert offset == 0


@pytest.fixture
def recordings(monkeypatch):
    """Recordings on a processor; each as it is made."""
    made = []

    def record(work, stream):
        made.append(PlayedGraph(work))
        return made[-1].found, made[-1]

    monkeypatch.setattr(recorded_call, "record", record)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "default_generators", FirstGenerator())
    monkeypatch.setattr(modeling_decoder, "can_record", lambda module, inputs: torch.is_grad_enabled())
    return made


def losses_and_gradients(schedule, task):
    """Of two steps, of which the second is of other documents and changed weights."""
    torch.manual_seed(0)
    model = tiny_model(schedule=schedule).double().train()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _, input_ids, mask = batch_of([[8, 8, 3], [5], [8, 2]])
        labels = random_ids(3, 3, 4).masked_fill(~mask.bool()[:, :, :1], -100)
        model.zero_grad()
        labels = labels if task == "sections" else labels[:, 0]
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 0.9)
    return found


@pytest.mark.parametrize("task", ["document", "sections"])
def test_numbers_are_those_of_a_plain_decoder(recordings, task):
    expected = losses_and_gradients("sequential", task)
    assert not recordings
    torch.testing.assert_close(losses_and_gradients("auto", task), expected, rtol=0, atol=1e-12)
    # forward and backward, once for both steps
    assert len(recordings) == 2


def test_another_shape_is_another_recording_and_the_oldest_are_forgotten(recordings, make_model):
    model = make_model(schedule="auto").train()
    for length in range(2, 9):
        model(input_ids=random_ids(1, 2, 8), labels=random_ids(1, length)).loss.backward()
    assert len(recordings) == 2 * 7
    kept = recorded_call._recordings[model.model.decoder]
    assert len(kept) == recorded_call.MOST_RECORDINGS


def test_what_asks_for_more_than_states_is_not_recorded(recordings, make_model):
    model, inputs = make_model(schedule="auto"), {"input_ids": random_ids(1, 2, 8), "labels": random_ids(1, 4)}
    assert model(**inputs, output_hidden_states=True).decoder_hidden_states
    with torch.no_grad():
        model(**inputs)
    assert not recordings


def test_a_processor_records_nothing(make_model):
    model = make_model(schedule="auto")
    assert not recorded_call.can_record(model.model.decoder, [torch.zeros(1)])
