"""One thread that runs the model. Short texts are read together; long readings give way to other requests."""

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from inspect import isgenerator
from typing import Any

from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.model.decoding.stopping import StopWhen
from recurrent_bart.serving.settings import Settings

# characters of texts that are read together at most, so that one step does not tokenise for seconds
TOGETHER_CHARACTERS = 2**18
# long readings that have begun at most; each keeps its state in memory
N_IN_TURN = 4


class Busy(RuntimeError):  # noqa: N818 - a status, not a fault
    """Notice that too many requests wait for the model."""


class Stopped(RuntimeError):  # noqa: N818 - a status, not a fault
    """Notice that the client of a request is gone."""


@dataclass(eq=False)
class Job:
    """Work for the model: a function, or a text with its settings of generation.

    Attributes:
        work: Function of the job. It returns the result, or a generator of steps that returns the result.
        key: Jobs with the same key run one after another, in their order.
        is_long: The job does not run before short ones.
    """

    work: Callable[["Job"], Any] | None = None
    text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    is_long: bool = False
    result: Future = field(default_factory=Future)
    is_stopped: bool = False

    def stop(self) -> None:
        """End the job, because its client is gone: at once, after the current step, or in its generation."""
        self.is_stopped = True
        self.result.cancel()

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless the job is answered."""
        with contextlib.suppress(InvalidStateError):
            self.result.set_exception(error)

    def criteria(self) -> dict[str, Any]:
        """Return the argument of `generate` that ends the generation when the job is stopped."""
        return {"stopping_criteria": [StopWhen(lambda: self.is_stopped)]}


@dataclass(eq=False)
class Task:
    """Begun jobs that run together, and the steps that answer them."""

    jobs: list[Job]
    steps: Iterator[None]

    @property
    def is_long(self) -> bool:
        """True for a long reading."""
        return self.jobs[0].is_long


class ModelWorker:
    """Thread that runs the model for all requests.

    Short jobs begin in their order. After each of them, and while there are none, one of the begun jobs does one step.
    Begun jobs have their steps in turn. At most `N_IN_TURN` of them are long.
    """

    def __init__(self, summarizer: Summarizer, settings: Settings):
        self.summarizer, self.settings = summarizer, settings
        self._pending: dict[Job, None] = {}
        # jobs that have not begun; a key's next job is here only in `_lines`
        self._short: deque[Job] = deque()
        self._long: deque[Job] = deque()
        self._lines: dict[str, deque[Job]] = {}
        self._begun: deque[Task] = deque()
        self._has_work, self._is_over, self._was_begun = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def n_pending(self) -> int:
        """Number of requests that wait for the model or are being answered."""
        return len(self._pending)

    @property
    def is_alive(self) -> bool:
        """True while the thread answers jobs."""
        return self._thread.is_alive()

    def add(self, job: Job, is_limited: bool = True) -> Job:
        """Let the thread do a job, and return it. Raise Busy if too many requests wait."""
        with self._has_work:
            if self._is_over or (is_limited and self.n_pending >= self.settings.n_waiting):
                raise Busy
            self._pending[job] = None
            if job.key is not None:
                self._lines.setdefault(job.key, deque()).append(job)
            if job.key is None or self._lines[job.key][0] is job:
                self._enqueue(job)
            self._has_work.notify()
        return job

    def close(self) -> None:
        """Finish the waiting work, and end the thread."""
        with self._has_work:
            self._is_over = True
            self._has_work.notify()
        self._thread.join()

    def _enqueue(self, job: Job) -> None:
        (self._long if job.is_long else self._short).append(job)

    def _leave(self, job: Job) -> None:
        """Take a job off the list, and let the next job with its key run."""
        del self._pending[job]
        line = self._lines.get(job.key or "", deque())
        was_first = bool(line) and line[0] is job
        if line:
            line.remove(job)
        if line and was_first:
            self._enqueue(line[0])
        elif job.key is not None and not line:
            del self._lines[job.key]

    def _run(self) -> None:
        try:
            while task := self._next():
                is_over = self._do_step(task)
                with self._has_work:
                    if is_over:
                        for job in task.jobs:
                            self._leave(job)
                    else:
                        self._begun.append(task)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Refuse further jobs, and let all waiting jobs fail, because the thread ends."""
        with self._has_work:
            self._is_over = True
            for job in self._pending:
                job.fail(RuntimeError("the model's thread has ended"))

    def _do_step(self, task: Task) -> bool:
        """Do one step. Return True if no step is left."""
        error: Exception = Stopped()
        try:
            if not all(job.is_stopped for job in task.jobs):
                return next(task.steps, self) is self
            # a generator that is closed writes nothing
            task.steps.close()  # type: ignore[attr-defined]
        except BaseException as fault:
            # an event loop that is given another kind of exception would end
            error = fault if isinstance(fault, Exception) else RuntimeError(type(fault).__name__)
        for job in task.jobs:
            job.fail(error)
        return True

    def _next(self) -> Task | None:
        """Wait for work. Return a begun job, or begin the next short one. Return None at the end."""
        with self._has_work:
            while True:
                self._has_work.wait_for(lambda: self._short or self._long or self._begun or self._is_over)
                self._drop_stopped()
                self._begin_long()
                if self._begun and not (self._short and self._was_begun):
                    self._was_begun = True
                    return self._begun.popleft()
                self._was_begun = False
                if self._short and (task := self._begin_short()):
                    return task
                if self._is_over and not self._pending:
                    return None

    def _drop_stopped(self) -> None:
        """Drop the jobs that were stopped before they began."""
        # the future of a begun job cannot be cancelled; the last job first, so that none enqueues the next one
        gone = [job for job in reversed(self._pending) if job.result.cancelled()]
        if gone:
            dropped = set(gone)
            self._short = deque(job for job in self._short if job not in dropped)
            self._long = deque(job for job in self._long if job not in dropped)
        for job in gone:
            self._leave(job)

    def _begin_long(self) -> None:
        """Let long jobs take turns with the begun ones, while few long ones do."""
        n_long = sum(task.is_long for task in self._begun)
        while self._long and n_long < N_IN_TURN:
            if task := self._begin([self._long.popleft()]):
                self._begun.append(task)
                n_long += 1

    def _begin_short(self) -> Task | None:
        """Begin the first short job. Begin texts with equal settings together."""
        jobs = [self._short.popleft()]
        n_characters = len(jobs[0].text)
        for job in list(self._short) if jobs[0].work is None else []:
            fits = len(jobs) < self.settings.n_together and n_characters + len(job.text) <= TOGETHER_CHARACTERS
            if fits and job.work is None and job.options == jobs[0].options:
                jobs.append(job)
                n_characters += len(job.text)
                self._short.remove(job)
        return self._begin(jobs)

    def _begin(self, jobs: list[Job]) -> Task | None:
        """Begin jobs of a task. Drop a job that was stopped just now. Return None if no job is left."""
        begun = []
        for job in jobs:
            if job.result.set_running_or_notify_cancel():
                begun.append(job)
            else:
                self._leave(job)
        if not begun:
            return None
        return Task(begun, self._steps_of_texts(begun) if begun[0].work is None else self._steps(begun[0]))

    def _steps(self, job: Job) -> Iterator[None]:
        assert job.work is not None
        try:
            result = job.work(job)
            if isgenerator(result):
                result = yield from result
        except Exception as error:
            job.result.set_exception(error)
        else:
            job.result.set_result(result)

    def _steps_of_texts(self, jobs: list[Job]) -> Iterator[None]:
        """Answer jobs with texts. If reading them together fails, each is read alone, so one text fails alone."""
        waiting, failure = dict(enumerate(jobs)), None
        criteria = {"stopping_criteria": [StopWhen(lambda: all(job.is_stopped for job in jobs))]}
        summarizer = with_options(self.summarizer, {**jobs[0].options, **criteria})
        try:
            for found in summarizer.summarize_in_steps([job.text for job in jobs]):
                for index, summary in found.items():
                    waiting.pop(index).result.set_result(summary)
                yield
        except Exception as error:
            failure = error if len(jobs) == 1 else None
        for job in waiting.values():
            if failure is not None:
                job.result.set_exception(failure)
            else:
                yield from self._steps_of_texts([job])


def with_options(summarizer: Summarizer, options: Mapping[str, Any]) -> Summarizer:
    """Return a summarizer of the same model with other settings of generation, of citations, or another `query`."""
    changed, options = copy.copy(summarizer), dict(options)
    for name in ("citations", "query"):
        if name in options:
            setattr(changed, name, options.pop(name))
    changed.generation = {**summarizer.generation, **options}
    return changed
