"""Starts launch/train.py in processes that nobody watches over, with something that goes wrong in some of them.

A launcher ends all processes when one has ended; here each must see for itself.
"""

import functools

from faults import injected
from forked import launched, run_script


def train(flags, n_processes=2, fault=None, ranks=(1,), timeout=100, ends_when=None, **settings):
    """Run until all processes have ended; gives what they have left.

    Args:
        flags: Command line.
        n_processes: How many.
        fault: Name of a function of `injected`, called in the processes `ranks` before they begin.
        ranks: Where it goes wrong.
        timeout: Seconds after which those left are killed, and the test fails.
        ends_when: Once these ranks have ended, the others are killed: they hang on purpose.
        settings: Of the fault.
    """
    goes_wrong = functools.partial(getattr(injected, fault), **settings) if fault else None
    firsts = [goes_wrong if rank in ranks else None for rank in range(n_processes)]
    environments = launched(n_processes)
    return run_script(
        "launch/train.py", *flags, environments=environments, firsts=firsts, timeout=timeout, ends_when=ends_when
    )
