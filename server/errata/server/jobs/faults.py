"""Ends the process in the middle of an edit, on purpose, to show that nothing is lost or doubled.

A server does this only where `ERRATA_FAULT` names a stage in its own environment. Whoever can set that can end the
process anyway, and an end at any stage is what the ledger and the stores are made for: the worst that a forgotten
setting does is that edits are resumed three times and then fail with INTERRUPTED. It is logged at start.
"""

import logging
import os
import signal
from collections.abc import Callable, Mapping

from errata.editor.errors import InvalidInputError

STAGES = ("queued", "values", "solved", "stored", "committed")
"""Of an edit: claimed; values being optimised; delta solved; delta and artifacts on disk; ledger written."""

VARIABLE = "ERRATA_FAULT"
"""The environment variable that names a stage."""

Fault = Callable[[str], None]
"""Called with each stage that an edit reaches."""

_log = logging.getLogger(__name__)


def no_fault(_stage: str) -> None:
    """Does nothing: every server but one under test."""


def fault_of(environment: Mapping[str, str]) -> Fault:
    """The fault that the environment asks for: `no_fault` nearly always. Raises InvalidInputError for no stage."""
    wanted = environment.get(VARIABLE, "")
    if not wanted:
        return no_fault
    if wanted not in STAGES:
        raise InvalidInputError(f"{wanted!r} is no stage of an edit; use one of {', '.join(STAGES)}", field=VARIABLE)
    _log.warning("%s=%s: this process will end itself in the first edit that gets there", VARIABLE, wanted)

    def fault(stage: str) -> None:
        if stage == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault
