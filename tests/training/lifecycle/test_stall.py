"""Stall watch: a run that makes no progress is reported once."""

import time

from recurrent_bart.training.lifecycle.stall import StallWatch

LONG = 0.1


def test_it_is_said_once_each_time_that_nothing_happens():
    said = []
    with StallWatch(LONG, lambda: said.append(time.perf_counter())) as watch:
        for _ in range(4):
            time.sleep(LONG / 4)
            watch.beat()
        assert said == []
        time.sleep(4 * LONG)
        assert len(said) == 1
        watch.beat()
        time.sleep(4 * LONG)
        assert len(said) == 2
    time.sleep(3 * LONG)
    assert len(said) == 2


def test_its_end_is_not_waited_for_long():
    begun = time.perf_counter()
    with StallWatch(60, lambda: None):
        pass
    assert time.perf_counter() - begun < 5
