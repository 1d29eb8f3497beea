"""One thread that runs the model. Texts that wait together are read together, in batches of similar length."""

import copy
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.settings import Settings


class Busy(RuntimeError):  # noqa: N818 - a status, not a fault
    """Notice that too many requests wait for the model."""


@dataclass
class Job:
    """Work for the model: a function, or a text with its settings of generation."""

    work: Callable[[], Any] | None = None
    text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    result: Future = field(default_factory=Future)


class ModelWorker:
    """Thread that runs the model for all requests, in their order."""

    def __init__(self, summarizer: Summarizer, settings: Settings):
        self.summarizer, self.settings = summarizer, settings
        self._waiting: deque[Job] = deque()
        self._has_work, self._is_over = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Number of requests that wait for the model."""
        return len(self._waiting)

    def call(self, work: Callable[[], Any]) -> Future:
        """Let the thread call a function. Raise Busy if too many requests wait."""
        return self._add(Job(work))

    def summarize(self, text: str, options: Mapping[str, Any]) -> Future:
        """Let the thread summarise a text, together with texts that wait for the same settings."""
        return self._add(Job(text=text, options=options))

    def close(self) -> None:
        """Finish the waiting work, and end the thread."""
        with self._has_work:
            self._is_over = True
            self._has_work.notify()
        self._thread.join()

    def _add(self, job: Job) -> Future:
        with self._has_work:
            if self._is_over or len(self._waiting) >= self.settings.n_waiting:
                raise Busy
            self._waiting.append(job)
            self._has_work.notify()
        return job.result

    def _run(self) -> None:
        while found := self._next():
            # a client that went away has cancelled its job
            jobs = [job for job in found if job.result.set_running_or_notify_cancel()]
            if jobs and jobs[0].work is not None:
                _answer(jobs[0], jobs[0].work)
            elif jobs:
                self._summarize(jobs)

    def _next(self) -> list[Job]:
        """Wait for work. Return one call, or all texts with equal settings that may be read together."""
        with self._has_work:
            self._has_work.wait_for(lambda: self._waiting or self._is_over)
            if not self._waiting:
                return []
            jobs = [self._waiting.popleft()]
            if jobs[0].work is None:
                fit = [job for job in self._waiting if job.work is None and job.options == jobs[0].options]
                jobs += fit[: self.settings.n_together - 1]
                taken = set(map(id, jobs))
                self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            return jobs

    def _summarize(self, jobs: list[Job]) -> None:
        summarizer = with_options(self.summarizer, jobs[0].options)
        try:
            summaries = summarizer.summarize([job.text for job in jobs])
            assert len(summaries) == len(jobs)
        except ValueError:
            # one text has no tokens; the other texts get their summaries
            for job in jobs:
                _answer(job, lambda text=job.text: summarizer(text))  # type: ignore[misc]
        except Exception as error:
            for job in jobs:
                job.result.set_exception(error)
        else:
            for job, summary in zip(jobs, summaries, strict=True):
                job.result.set_result(summary)


def with_options(summarizer: Summarizer, options: Mapping[str, Any]) -> Summarizer:
    """Return a summarizer of the same model with other settings of generation, of citations, or another `query`."""
    changed, options = copy.copy(summarizer), dict(options)
    changed.citations = options.pop("citations", summarizer.citations)
    changed.query = options.pop("query", summarizer.query)
    changed.generation = {**summarizer.generation, **options}
    return changed


def _answer(job: Job, work: Callable[[], Any]) -> None:
    try:
        job.result.set_result(work())
    except Exception as error:
        job.result.set_exception(error)
