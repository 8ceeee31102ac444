"""Ctrl-C: exit code 130 and one line, at once, whatever the process is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import folders
import pytest

#: Seconds from the signal to the end of the process, at most.
AT_ONCE = 2

#: Says when interrupts are taken care of, and runs the command line.
START = (
    "import os; from qkattr.cli import entry; entry.exit_when_interrupted(); os.write(1, b'.'); "
)
RUN = START + "entry.run()"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupt")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return root


def interrupted(script: str, *arguments, after: float, cwd=None) -> subprocess.Popen:
    """The process, ended by an interrupt; its `err` and `seconds`."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, cwd=cwd, env=environment, start_new_session=True)
    assert process.stdout.read(1) == b"."
    time.sleep(after)
    start = time.perf_counter()
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, err = process.communicate(timeout=60)
    process.err, process.seconds = err.decode(), time.perf_counter() - start
    return process


def check(process) -> None:
    assert (process.returncode, process.err) == (130, "qkattr: interrupted\n")
    assert process.seconds < AT_ONCE


@pytest.mark.parametrize("after", [0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2])
def test_at_any_time_of_a_trace(model, tmp_path, after):
    folder = tmp_path / "out"
    how = ("-m", model / "model", "-s", model / "saes", "--out", folder)
    check(interrupted(RUN, "trace", "hi hi hi 12", *how, after=after, cwd=tmp_path))
    assert not folder.exists()


@pytest.mark.parametrize(
    "busy",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        # Python runs no handler while this computes, and it lets go of the lock.
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**8)",
        "import sys, threading; threading.Thread(target=sys.stdin.read).start()",
        "class A:\n  def __del__(self):\n    while True: pass\ndel A",
        "try:\n  while True: pass\nexcept BaseException: pass",
        "import subprocess; subprocess.run(['sleep', '60'])",
    ],
)
def test_whatever_it_is_doing(busy):
    ready = START.replace("os.write(1, b'.'); ", "")
    script = f"{ready}\nprint('.', end='', flush=True)\n{busy}\nimport time; time.sleep(60)"
    check(interrupted(script, after=0.1))


def test_twice():
    script = START + "import time; time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(1) == "."
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "qkattr: interrupted\n"
    assert process.returncode == 130


def test_ignored_where_it_was_ignored_before():
    """As under nohup, or in the background of a shell script."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from qkattr.cli import entry; entry.exit_when_interrupted()\n"
        "signal.raise_signal(signal.SIGINT); print('on')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


@pytest.mark.parametrize("arguments, code", [(["--version"], 0), (["qk"], 2), (["nothing"], 2)])
def test_a_process_that_ends_by_itself_keeps_its_code(arguments, code):
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert bool(done.stderr) == (code == 2) and done.stdout.startswith(".")


def test_what_is_left_to_do_at_the_end_is_done(tmp_path):
    script = "import atexit; atexit.register(print, 'left'); " + RUN
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True)
    assert done.stdout.endswith(b"left\n")
