"""Runs of launch/train.py in processes without a launcher, with a fault in some of them.

A launcher ends all processes after the first has ended; here each process must detect the fault by itself.
"""

import functools

from faults import injected
from forked import launched, run_script


def train(flags, n_processes=2, fault=None, ranks=(1,), timeout=100, ends_when=None, **settings):
    """Run until all processes have ended; return their exit codes and output.

    Args:
        flags: Command line.
        n_processes: Number of processes.
        fault: Name of a function of `injected`, called in the processes `ranks` before they begin.
        ranks: Ranks with the fault.
        timeout: Time in seconds after which remaining processes are killed and the test fails.
        ends_when: Once these ranks have ended, kill the remaining ones, which hang on purpose.
        settings: Arguments of the fault.
    """
    goes_wrong = functools.partial(getattr(injected, fault), **settings) if fault else None
    firsts = [goes_wrong if rank in ranks else None for rank in range(n_processes)]
    environments = launched(n_processes)
    return run_script(
        "launch/train.py", *flags, environments=environments, firsts=firsts, timeout=timeout, ends_when=ends_when
    )
