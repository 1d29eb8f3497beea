"""Requests of many clients to a served model: their times, errors, and the memory of the service.

`PYTHONPATH=.:tests python tests/serving/load.py 10000` prints them for a tiny model.
"""

import concurrent.futures
import http.client
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from runs import WORDS, write_run_with_model
from serving.server import Server

N_CLIENTS = 8


@dataclass
class Load:
    """Results of many requests.

    Attributes:
        errors: Statuses of 400 and above, and broken events, with their requests.
        resident: Resident memory of the service in MiB, by the number of requests before.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resident: dict[int, float] = field(default_factory=dict)

    def percentile(self, percent):
        """Return a percentile of the requests' times in milliseconds."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[percent - 1]


class Client:
    """Client with one connection at a time, whose requests are timed."""

    def __init__(self, port, load):
        self.connection, self.load = http.client.HTTPConnection("127.0.0.1", port, timeout=300), load

    def ask(self, method, path, content=""):
        begin = time.perf_counter()
        self.connection.request(method, path, content.encode(), {"content-type": "text/plain"})
        answer = self.connection.getresponse()
        body = answer.read()
        self.load.seconds.append(time.perf_counter() - begin)
        if answer.status >= 400 or b"event: error" in body:
            self.load.errors.append(f"{method} {path}: {answer.status} {body[:200]!r}")
        return body

    def ten_requests(self, number):
        """Send summaries of texts of several lengths, a stream, and one session from its beginning to its end."""
        # the service closes a connection that was idle while slower clients went on; this opens a new one
        self.connection.close()
        text = " ".join(WORDS[number % 7 :] * (1 + number % 3))
        for length in (30, 300, len(text)):
            self.ask("POST", "/v1/summaries", text[:length])
        self.ask("POST", "/v1/summaries?stream=true", text)
        path = f"/v1/sessions/{json.loads(self.ask('POST', '/v1/sessions'))['id']}"
        self.ask("POST", f"{path}/text?position=0", text)
        self.ask("GET", f"{path}/summary")
        self.ask("POST", f"{path}/sections?number=1")
        self.ask("GET", f"{path}/state")
        self.ask("DELETE", path)


def run_load(server, n_requests, n_between, on_part=lambda load: None):
    """Send about `n_requests`, and note the service's memory after every `n_between` of them; then call `on_part`."""
    load = Load()
    clients = [Client(server.port, load) for _ in range(N_CLIENTS)]

    def send(numbers):
        client, part = numbers
        for number in part:
            client.ten_requests(number)

    with concurrent.futures.ThreadPoolExecutor(N_CLIENTS) as pool:
        for begin in range(0, n_requests // 10, n_between // 10):
            numbers = range(begin, begin + n_between // 10)
            list(pool.map(send, zip(clients, (numbers[index::N_CLIENTS] for index in range(N_CLIENTS)), strict=True)))
            load.resident[len(load.seconds)] = resident_mib(server.process.pid)
            on_part(load)
    return load


def resident_mib(process):
    """Return the resident memory of a process in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def main(n_requests):
    """Serve a tiny model, send requests and print the results."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run_with_model(Path(folder) / "run", [" ".join(WORDS * 12)], {"data": {"max_target_length": 6}})
        server = Server(run.model, Path(folder) / "sessions")
        try:
            load = run_load(server, n_requests, n_requests // 10, describe)
        finally:
            server.stop(signal.SIGTERM)
    print(*load.errors[:10], sep="\n")


def describe(load):
    """Print the results so far."""
    number, mib = list(load.resident.items())[-1]
    times = (
        f"p50 {load.percentile(50):.1f} ms, p95 {load.percentile(95):.1f} ms, most {1000 * max(load.seconds):.0f} ms"
    )
    print(f"{number} requests: {len(load.errors)} errors, {times}, {mib:.1f} MiB resident", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
