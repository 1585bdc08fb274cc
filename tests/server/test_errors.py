"""Every error that is raised on purpose has a gRPC code, a reason of its own, and a place in the tree."""

import importlib
import pkgutil
import re
from collections.abc import Iterator

import grpc
import pytest

import errata.editor
import errata.editor.errors
import errata.server.app  # brings all of the server but MLflow
import errata.server.errors
from errata.editor.errors import ErrataError
from errata.server.errors import (
    CODES,
    DeadlineExceededError,
    EngineError,
    LedgerUnavailableError,
    ServiceError,
    code_of,
)
from errata.server.settings import SettingsError
from errata.server.status import status_of

NEVER_ON_THE_WIRE = {ErrataError, ServiceError, SettingsError}
"""Two are only bases; the last one stops a start."""

for _module in pkgutil.iter_modules(errata.editor.__path__, "errata.editor."):
    importlib.import_module(_module.name)


def _below(kind: type[ErrataError]) -> Iterator[type[ErrataError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _below(child)


def _on_the_wire(kind: type[ErrataError]) -> bool:
    """Studies, and work in shards, run without a server."""
    module = kind.__module__
    apart = module.startswith(("errata.server.studies", "errata.server.cluster"))
    return module.startswith(("errata.editor", "errata.server")) and not apart and kind not in NEVER_ON_THE_WIRE


RAISED = sorted({c for c in _below(ErrataError) if _on_the_wire(c)}, key=lambda c: c.__name__)


def test_all_of_the_trees_are_there() -> None:
    assert len(RAISED) > 35
    assert {EngineError, DeadlineExceededError, LedgerUnavailableError} <= set(RAISED)


@pytest.mark.parametrize("kind", RAISED)
def test_an_error_has_a_code_by_itself_or_by_its_base(kind: type[ErrataError]) -> None:
    assert any(each in CODES for each in kind.__mro__)
    assert (CODES.get(kind) is grpc.StatusCode.INTERNAL) == (kind is EngineError)


def test_every_error_has_a_reason_of_its_own() -> None:
    reasons = [kind.reason for kind in RAISED]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[A-Z]+(_[A-Z]+)*", reason) for reason in reasons)


@pytest.mark.parametrize("module", [errata.editor.errors, errata.server.errors])
def test_the_tree_at_the_top_of_a_file_names_every_class_in_it(module: object) -> None:
    defined = {c.__name__ for c in _below(ErrataError) if c.__module__ == module.__name__}  # type: ignore[attr-defined]
    assert defined <= set(re.findall(r"\w+Error", module.__doc__ or ""))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlineExceededError("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (LedgerUnavailableError("away", retry_after=1.0), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_a_narrower_error_does_not_have_its_bases_code(error: ErrataError, code: grpc.StatusCode) -> None:
    assert code_of(error) is code
    assert status_of(error).code == code.value[0]
