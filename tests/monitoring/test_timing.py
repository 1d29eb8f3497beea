"""Kinds of work are timed separately."""

import time

import pytest
import torch

from recurrent_bart.monitoring import timing as module
from recurrent_bart.monitoring.timing import Stopwatch

PAUSE = 0.02


def test_seconds_of_a_kind_add_up_until_they_are_read():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.measure("forward"):
            time.sleep(PAUSE)
    with watch.measure("backward"):
        pass
    seconds = watch.seconds()
    assert seconds.keys() == {"forward", "backward"}
    assert 2 * PAUSE <= seconds["forward"] < 20 * PAUSE
    assert seconds["backward"] < PAUSE
    assert watch.seconds() == {}


def test_waiting_for_items_is_timed_and_their_use_is_not():
    def slow():
        for number in range(2):
            time.sleep(PAUSE)
            yield number

    watch = Stopwatch(torch.device("cpu"))
    found = []
    for item in watch.each("data", slow()):
        time.sleep(3 * PAUSE)
        found.append(item)
    assert found == [0, 1]
    assert 2 * PAUSE <= watch.seconds()["data"] < 6 * PAUSE


def test_a_gpu_is_not_synchronised_before_the_seconds_are_read(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda device: happened.append("wait"))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        with watch.measure("forward"):
            pass
    with watch.measure("data", on_host=True):
        time.sleep(PAUSE)
    assert happened == ["event"] * 4
    seconds = watch.seconds()
    assert happened == ["event"] * 4 + ["wait"]
    assert seconds["forward"] == pytest.approx(3.0)
    assert PAUSE <= seconds["data"] < 20 * PAUSE
