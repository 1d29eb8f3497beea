"""The service as a process, for tests."""

import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
import urllib.request

from launching import TESTS, environment, free_port


class Server:
    """Process of the service on a free port, with at most `n_files` open files."""

    def __init__(self, model, folder, *flags, n_files=1024):
        self.port = free_port()
        program = [sys.executable, TESTS.parent / "recurrent_bart_cli.py", "serve", "--model", model]
        command = [*program, "--port", self.port, "--sessions", folder, *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=environment(),
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, n_files)),
        )
        for _ in range(600):
            with contextlib.suppress(OSError):
                if self.ask("GET", "/health"):
                    return
            assert self.process.poll() is None
            time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def ask(self, method, path, content=None):
        """Return the JSON of an answer."""
        address = f"http://127.0.0.1:{self.port}{path}"
        given = None if content is None else content.encode()
        request = urllib.request.Request(address, given, {"content-type": "text/plain"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def connect(self, length):
        """Open a connection, and send the head of a request with a body."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(f"POST /v1/summaries HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}\r\n\r\n".encode())
        return connection

    def stop(self, number):
        self.process.send_signal(number)
        _, printed = self.process.communicate(timeout=60)
        return self.process.returncode, printed.decode()
