"""Servers in processes forked from one that has imported what a server imports: that takes most of a server's start."""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import IO

import pytest
from processes import PORTIONS, Child, ServerProcess

from errata.server.__main__ import cli


class ForkedServer(ServerProcess):
    """A server that starts in a second, with settings, files and an end of its own."""

    def _start(self, command: list[str], environment: dict[str, str]) -> tuple[Child, IO[str]]:
        arguments = command[command.index("errata.server") + 1 :]
        ours, theirs = multiprocessing.Pipe(duplex=False)
        with ours, theirs:
            process = _template().Process(target=_serve, args=(theirs, arguments, environment))
            process.start()
            return Fork(process), os.fdopen(os.dup(ours.fileno()))


class Fork:
    """A forked process in the words of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit status, once it has ended."""
        self._process.join(timeout)
        status = self._process.exitcode
        assert status is not None, "the process did not end in time"
        return status

    def send_signal(self, signal: int) -> None:
        """Sends it a signal."""
        assert self._process.pid
        os.kill(self._process.pid, signal)

    def terminate(self) -> None:
        """Asks it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()


@cache
def _template() -> ForkServerContext:
    """Forks processes that have imported a server and MLflow, and have done nothing with them yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["errata.server.app", "errata.server.registry.registry", "peft"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PORTIONS)
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _serve(said: Connection, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    said.close()
    os.environ.clear()
    os.environ.update(environment)
    cli(arguments, prog_name="python -m errata.server")
