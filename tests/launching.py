"""Scripts that tests load, and processes that tests start: environment, timeout and cleanup."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# variables of the launcher that runs the tests, which started processes must not inherit
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**changes):
    """Return the environment of a started process: this checkout and the test modules, one thread, no network."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    scripts = Path(sys.executable).parent
    return inherited | {
        "PATH": f"{scripts}{os.pathsep}{inherited['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), inherited.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


def run(command, timeout, **changes):
    """Run a command; after the timeout, kill it and its children.

    Returns:
        Return code and printed output.
    """
    started = subprocess.Popen(
        list(map(str, command)),
        cwd=TESTS.parent,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        output, _ = started.communicate()
        raise AssertionError(f"not over after {timeout} s: {command}\n{output}") from None
    return started.returncode, output


def forks(commands, imports, absent, code=0):
    """Return a command for `run`: one new process imports modules and runs scripts, each in a fork of it.

    Args:
        commands: Environment variables of each fork, and its script with the arguments.
        imports: Modules that are imported once, before the forks.
        absent: Module that must not be imported by then.
        code: Exit code of each fork.
    """
    program = f"""
import os, runpy, sys
import {", ".join(imports)}
assert {absent!r} not in sys.modules
for variables, argv in {[(variables, [str(part) for part in argv]) for variables, argv in commands]}:
    process = os.fork()
    if not process:
        os.environ.update(variables)
        sys.argv = argv
        # a script ends by SystemExit, as in a process of its own
        runpy.run_path(argv[0], run_name="__main__")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == {code}, argv
"""
    return [sys.executable, "-c", program]


def deepspeed(script, *arguments, timeout=270, **changes):
    """Run a script by the deepspeed launcher on a free port; see `run`."""
    return run(["deepspeed", "--master_port", free_port(), script, *arguments], timeout, **changes)


def load_script(name):
    """Return the module of the command `NAME`, whose `main` can run in this process."""
    return importlib.import_module(f"recurrent_bart.commands.{name}")


def assert_one_error(printed, message):
    """Check that a script printed the error in one line and nothing more; `printed` is pytest's captured output."""
    assert printed.out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err)


def free_port():
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
