"""An object in a process of its own: one implementation cannot disturb another one's caches, threads or memory.

The processes are forks of a server that has imported TensorFlow and run nothing of it, so one starts in a third of a
second and begins with the memory of an import. What needs no TensorFlow gets a fresh process, whose libraries find the
environment variables that they read when they are loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"}
_PRELOAD = ["tensorflow"]
SMALL_PAGES = {"NUMPY_MADVISE_HUGEPAGE": "0"}  # NumPy's large arrays have huge pages, TensorFlow's tensors have not
_STDERR = 2  # the descriptor that TensorFlow's C++ logs to
_NOISE = ("Graph execution error", "Detected at node", "File ", "[Op:", "[[{{node")  # around a TensorFlow error's text
_ERROR_LENGTH = 500  # characters
_LOG_TAIL = 2000  # characters of a dead process's log that an error shows


def library_environment(threads: int) -> dict[str, str]:
    """What a fresh process's libraries read: their number of threads, pages as TensorFlow's."""
    return {**SMALL_PAGES, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


class WorkerError(RuntimeError):
    """A call failed in the worker: the error's type and text. The worker lives on unless `dead`."""

    def __init__(self, text: str, dead: bool = False):
        super().__init__(text)
        self.dead = dead


class Worker:
    """A proxy of `factory(*arguments)`, "module:Class", that lives in a process of its own.

    With `fresh`, that is a new process with these environment variables, else a fork of the server.
    """

    def __init__(
        self,
        factory: str,
        arguments: tuple,
        log: pathlib.Path,
        timeout: float,
        fresh: Mapping[str, str] | None = None,
    ):
        context = multiprocessing.get_context("forkserver" if fresh is None else "spawn")
        context.set_forkserver_preload(_PRELOAD)
        self._connection, other = context.Pipe()
        self._log, self._timeout = log, timeout
        self._process = context.Process(target=_serve, args=(other, factory, arguments, log), daemon=True)
        with _quietly(log, fresh or {}):  # the first one starts the server
            self._process.start()
        other.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns; WorkerError if it raises, dies or takes longer than the timeout."""
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise self._dead("ended") from None
        return self.wait()

    def wait(self) -> Any:
        """The answer to the last call; the first one, to the constructor, is None."""
        try:
            if not self._connection.poll(self._timeout):
                self.close()
                raise self._dead(f"gave no answer in {self._timeout:g} s and was ended")
            succeeded, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._dead("ended") from None
        if not succeeded:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _dead(self, how: str) -> WorkerError:
        self._process.join(1)  # so that its exit code is there
        tail = self._log.read_text(errors="replace")[-_LOG_TAIL:].strip() if self._log.exists() else ""
        return WorkerError(f"the process {how} (exit code {self._process.exitcode}). {tail}", dead=True)


def _redirect_stderr(log: pathlib.Path) -> None:
    """TensorFlow's messages would tear the progress bar."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, _STDERR)
    os.close(descriptor)


@contextlib.contextmanager
def _quietly(log: pathlib.Path, environment: Mapping[str, str]) -> Iterator[None]:
    """What starts inside has our environment and this one, and writes its errors to the log."""
    saved, before = os.dup(_STDERR), dict(os.environ)
    sys.stderr.flush()
    _redirect_stderr(log)
    os.environ.update({**_ENVIRONMENT, **environment})
    try:
        yield
    finally:
        os.dup2(saved, _STDERR)
        os.close(saved)
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, factory: str, arguments: tuple, log: pathlib.Path) -> None:
    """Answers (method, arguments) with (True, value) or (False, the error's text) until the other end closes."""
    _redirect_stderr(log)
    os.environ.update(_ENVIRONMENT)
    module, _, name = factory.partition(":")
    target = None

    def construct() -> None:
        nonlocal target
        target = getattr(importlib.import_module(module), name)(*arguments)

    _answer(connection, construct)
    while target is not None:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        _answer(connection, getattr(target, method), *values)


def _answer(connection: Connection, function: Any, *arguments: Any) -> None:
    try:
        answer = (True, function(*arguments))
    except Exception as error:
        traceback.print_exc()
        answer = (False, _brief(error))
    connection.send(answer)


def _brief(error: Exception) -> str:
    """Type and text on one line, without the traceback that TensorFlow puts into the text."""
    lines = (line.strip() for line in str(error).splitlines())
    text = " ".join(line for line in lines if line and not line.startswith(_NOISE))
    return f"{type(error).__name__}: {text}"[:_ERROR_LENGTH]
