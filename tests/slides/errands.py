"""What the tests give to worker processes: functions of a module that imports little."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def errand(what: str, beat: Callable[[], None]) -> int:
    """Do as told: a number comes back doubled; other words end or stop the process."""
    if what == "exit":
        os._exit(3)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(600)
    if what == "slow":
        for _ in range(30):
            time.sleep(0.1)
            beat()
        return -1
    if what == "crash after the answer":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return -2
    return 2 * int(what)
