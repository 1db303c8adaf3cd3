"""Commands in processes of their own that stop where a test wants them to, however fast the machine is."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# `resta`, but once so many lines of a file are kept the model is never done with the next answer.
STUCK = """
import pathlib, sys, threading
from resta.redeval import models
path, lines = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1))
real = models.generate
def generate(*args, **given):
    if path.exists() and path.read_bytes().count(b"\\n") >= lines:
        threading.Event().wait()
    return real(*args, **given)
models.generate = generate
from resta.cli import main
main(sys.argv[1:])
"""
HOPELESS_S = 1800  # nothing takes as long; a test that waits for what never comes ends all the same


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for what a running process is to bring about."""
    hopeless = time.monotonic() + HOPELESS_S
    while not reached():
        assert process.poll() is None, f"it has ended: {process.returncode}"
        assert time.monotonic() < hopeless
        time.sleep(0.02)


def kill_once_kept(words: Sequence[object], path: Path, *, lines: int) -> None:
    """Run a command of `resta` that asks a local model; kill -9 it when so many lines of a file are kept."""
    command = [sys.executable, "-c", STUCK, str(path), str(lines), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_until(lambda: lines_of(path) >= lines, process)
    finally:
        process.kill()
        process.wait()


def lines_of(path: Path) -> int:
    """Return how many whole lines a file has; none where it is not there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
