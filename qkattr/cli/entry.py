"""The console script: what an interrupt does from the first line on, and how the process ends.

Ctrl-C prints one line and ends the process at once, with exit code 130. Nothing is unwound: that
would wait for a program that is being compiled, print tracebacks of whatever is being imported, and
take XLA's threads apart while they run. Files are written under other names and renamed (see
`files`), so that none is left half written.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import Any

INTERRUPTED = 130

_leaving = threading.Lock()


def run() -> None:
    """Run the command line of this process and end it."""
    exit_when_interrupted()
    from qkattr.cli.main import main

    code = main()
    # What follows in an interpreter that ends, freeing all it holds, takes half a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_when_interrupted() -> None:
    """From now on Ctrl-C ends the process, unless it was started with interrupts ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _leave)
    if os.name != "posix":
        return
    # Python calls a handler between two of its own instructions, which can be long after: in a
    # compilation, say. The number of a signal is written at once, and this thread waits for it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _watch(reading: int) -> None:
    while number := os.read(reading, 1):
        if number[0] == signal.SIGINT:
            _leave()


def _leave(*_: Any) -> None:
    if not _leaving.acquire(blocking=False):
        return
    # A progress display hides the cursor and leaves its line.
    shown = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    try:
        os.write(2, f"{shown}qkattr: interrupted\n".encode())
    finally:
        os._exit(INTERRUPTED)
