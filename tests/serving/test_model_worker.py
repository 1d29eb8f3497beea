"""The model's thread: long readings give way, stopped work ends, and one text that fails fails alone."""

import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from recurrent_bart.inference.reading_session import Summary
from recurrent_bart.serving.model_worker import Busy, Job, ModelWorker, Stopped
from recurrent_bart.serving.settings import Settings


class Echo:
    """Summarizer whose summary is the text; the text "big" does not fit into memory."""

    def __init__(self):
        self.generation, self.batches = {}, []

    def summarize_in_steps(self, texts):
        self.batches.append(list(texts))
        if "big" in texts:
            raise torch.OutOfMemoryError("no memory")
        yield {index: Summary(text, 1, 1) for index, text in enumerate(texts)}


@pytest.fixture
def make_worker(tmp_path):
    """Return a function that starts a worker with these settings; the test's end ends it."""
    workers = []

    def make(**settings):
        workers.append(ModelWorker(Echo(), Settings(tmp_path, **settings)))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def held(make_worker):
    """Return a worker, and an event that lets it begin with the jobs that wait."""
    worker, go = make_worker(), threading.Event()
    worker.add(Job(lambda _: go.wait(20)))
    while worker._short:
        time.sleep(0.01)
    return worker, go


def steps(name, n_steps, seen):
    """Return work of several steps, each of which is noted."""

    def work(_):
        for _ in range(n_steps):
            seen.append(name)
            yield
        return name

    return work


def test_short_requests_are_answered_between_the_steps_of_long_readings(held):
    (worker, go), seen = held, []
    long = [worker.add(Job(steps(f"long {number}", 9, seen), is_long=True)) for number in range(2)]
    short = [worker.add(Job(steps(f"short {number}", 1, seen))) for number in range(3)]
    go.set()
    assert [job.result.result(20) for job in (*long, *short)] == ["long 0", "long 1", "short 0", "short 1", "short 2"]
    assert [seen.index(f"short {number}") for number in range(3)] == sorted(
        seen.index(f"short {number}") for number in range(3)
    )
    assert max(seen.index(f"short {number}") for number in range(3)) < 7
    # long readings are read in turn
    assert seen.index("long 1") < 8
    assert worker.n_pending == 0


def test_a_short_job_with_many_steps_gives_way_too(held):
    (worker, go), seen = held, []
    jobs = [worker.add(Job(steps(name, n_steps, seen))) for name, n_steps in (("many", 9), ("one", 1))]
    go.set()
    assert [job.result.result(20) for job in jobs] == ["many", "one"]
    assert seen.index("one") < 3


def test_clients_wait_equally_long_and_long_readings_go_on(held):
    (worker, go), seen, waits, over = held, [], [], threading.Event()

    def ask(client, n_more):
        """Add a job of three steps, whose end adds the client's next job."""
        begin = len(seen)

        def work(job):
            yield from steps(client, 3, seen)(job)
            waits.append(len(seen) - begin)
            if n_more:
                ask(client, n_more - 1)
            if len(waits) == 400:
                over.set()

        worker.add(Job(work))

    for client in range(20):
        ask(client, 19)
    long = [worker.add(Job(steps(f"long {number}", 10, seen), is_long=True)) for number in range(2)]
    go.set()
    assert [job.result.result(20) for job in long] == ["long 0", "long 1"]
    assert over.wait(20)
    # every second step begins one of the 20 jobs; then each of 3 steps waits for 20 clients and 2 readings
    assert max(waits) <= 2 * 20 + 3 * 22
    last = len(seen) - 1 - seen[::-1].index("long 1")
    assert last < 600 < len(seen)


def test_few_long_readings_have_begun_at_a_time(held):
    (worker, go), seen = held, []
    jobs = [worker.add(Job(steps(number, 3, seen), is_long=True)) for number in range(6)]
    go.set()
    assert [job.result.result(20) for job in jobs] == list(range(6))
    assert seen == [0, 1, 2, 3] * 3 + [4, 5] * 3


def test_jobs_of_one_session_keep_their_order_and_never_mix(held):
    (worker, go), seen = held, []
    work = [("a", 3, True), ("b", 1, False), ("c", 2, True), ("d", 1, False)]
    jobs = [worker.add(Job(steps(name, n, seen), key="session", is_long=is_long)) for name, n, is_long in work]
    other = worker.add(Job(steps("other", 1, seen), key="other"))
    go.set()
    assert [job.result.result(20) for job in (*jobs, other)] == ["a", "b", "c", "d", "other"]
    assert [name for name in seen if name != "other"] == list("aaabccd")
    assert worker._lines == {}


def test_texts_are_read_together_and_one_that_does_not_fit_fails_alone(held):
    worker, go = held
    jobs = [worker.add(Job(text=text)) for text in ("a", "big", "b")]
    other = worker.add(Job(text="c", options={"num_beams": 2}))
    go.set()
    assert [job.result.result(20).text for job in (jobs[0], jobs[2], other)] == ["a", "b", "c"]
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        jobs[1].result.result(20)
    assert worker.summarizer.batches == [["a", "big", "b"], ["a"], ["big"], ["b"], ["c"]]


def test_texts_that_are_read_together_have_a_limited_size(held):
    worker, go = held
    jobs = [worker.add(Job(text=character * 100_000)) for character in "abcd"]
    go.set()
    assert [job.result.result(20).text[0] for job in jobs] == list("abcd")
    assert [len(batch) for batch in worker.summarizer.batches] == [2, 2]


@pytest.mark.parametrize("is_long", [True, False])
def test_stopped_work_is_dropped_from_the_queue_and_ends_after_its_step(held, is_long):
    (worker, go), seen = held, []
    begun, goes_on = threading.Event(), threading.Event()

    def work(job):
        try:
            for _ in range(100):
                seen.append("step")
                begun.set()
                goes_on.wait(20)
                yield
        finally:
            seen.append("closed")

    running = worker.add(Job(work, key="session", is_long=is_long))
    waiting = [worker.add(Job(steps("waiting", 1, seen), key=key)) for key in ("session", "session", "other", None)]
    waiting += [worker.add(Job(steps("waiting", 1, seen), key="line", is_long=is_long)) for is_long in (True, False)]
    for job in waiting:
        job.stop()
    go.set()
    assert begun.wait(20)
    running.stop()
    goes_on.set()
    with pytest.raises(Stopped):
        running.result.result(20)
    assert worker.add(Job(lambda _: "next", key="session")).result.result(20) == "next"
    assert seen == ["step", "closed"]
    assert all(job.result.cancelled() for job in waiting)
    assert (worker.n_pending, worker._lines) == (0, {})


def test_stopped_requests_make_room_for_new_ones(make_worker):
    worker, go = make_worker(n_waiting=3), threading.Event()
    worker.add(Job(lambda _: go.wait(20)))
    stopped = [worker.add(Job(text="a")) for _ in range(2)]
    with pytest.raises(Busy):
        worker.add(Job(text="a"))
    for job in stopped:
        job.stop()
    go.set()
    assert worker.add(Job(text="a"), is_limited=False).result.result(20).text == "a"
    assert worker.add(Job(text="b")).result.result(20).text == "b"
    assert worker.summarizer.batches == [["a"], ["b"]]


def test_a_worker_that_ends_answers_what_waits(make_worker):
    worker, seen = make_worker(), []
    jobs = [worker.add(Job(steps("long", 5, seen), key="a", is_long=True)), worker.add(Job(lambda _: "b", key="a"))]
    worker.close()
    assert [job.result.result(0) for job in jobs] == ["long", "b"]
    with pytest.raises(Busy):
        worker.add(Job(text="a"))


class Leaving(dict):
    """Options that are equal to all options. A client leaves while they are compared, as it may at any moment."""

    def __init__(self, leave):
        self.leave = leave

    def __eq__(self, other):
        self.leave()
        return True


@pytest.mark.parametrize("number", range(3))
def test_a_client_that_leaves_while_its_batch_is_collected_harms_nobody(held, number):
    worker, go = held
    jobs = [worker.add(Job(text=text, options=Leaving(lambda: jobs[number].stop()))) for text in "abc"]
    go.set()
    stayed = [job for job in jobs if job is not jobs[number]]
    assert [job.result.result(20).text for job in stayed] == [job.text for job in stayed]
    assert worker.add(Job(text="later")).result.result(20).text == "later"
    assert jobs[number].result.cancelled()
    assert (worker.is_alive, worker.n_pending) == (True, 0)


@pytest.mark.parametrize("error", [SystemExit, KeyError])
@pytest.mark.parametrize("n_steps", [0, 1])
def test_an_error_of_any_kind_fails_its_job_alone(make_worker, error, n_steps):
    worker = make_worker()

    def work(_):
        yield from range(n_steps)
        raise error

    with pytest.raises(KeyError if error is KeyError else RuntimeError):
        worker.add(Job(work)).result.result(20)
    assert worker.add(Job(text="later")).result.result(20).text == "later"


def test_no_request_waits_for_a_thread_that_has_ended(held, monkeypatch):
    worker, go = held
    jobs = [worker.add(Job(text="a")), worker.add(Job(text="b", key="session"))]
    # a fault of the thread itself
    monkeypatch.setattr(worker, "_drop_stopped", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    go.set()
    for job in jobs:
        with pytest.raises(RuntimeError, match="has ended"):
            job.result.result(20)
    with pytest.raises(Busy):
        worker.add(Job(text="c"))
    worker._thread.join(20)
    assert not worker.is_alive
