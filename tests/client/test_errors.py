"""Errors on the wire and back: by reason, by code, with their details; and errors that never had any."""

import asyncio
import pickle
from typing import Any

import grpc
import pytest
from fake_server import CAPITAL, Fake, Fault
from google.rpc import status_pb2  # type: ignore[import-untyped]

from errata.client import (
    AsyncErrata,
    BusyError,
    ConstraintNotFoundError,
    Context,
    DeadlineExceededError,
    DrainingError,
    EditRequest,
    Errata,
    ErrataError,
    FieldViolation,
    InternalError,
    InvalidInputError,
    MalformedError,
    MessageTooLargeError,
    NotFoundError,
    PageTokenError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
    errors,
)
from errata.client.details import DETAILS_KEY, read_details
from errata.editor import errors as editor_errors
from errata.server import errors as server_errors

Code = grpc.StatusCode


def _classes(root: type) -> list[Any]:
    children: list[type] = type.__subclasses__(root)
    return [root, *(found for child in children for found in _classes(child))]


THEIRS = [
    each
    for each in _classes(editor_errors.ErrataError)
    if each.__module__ in (editor_errors.__name__, server_errors.__name__) and each is not server_errors.ServiceError
]


def test_every_error_of_the_server_and_the_editor_is_looked_at() -> None:
    assert {editor_errors.NoOpEditError, server_errors.BaseChangedError} < set(THEIRS)


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_server_and_the_editor_has_its_class_here(theirs: type) -> None:
    ours = getattr(errors, theirs.__name__)
    said = errors.from_failure(theirs.reason, "why", "")  # type: ignore[attr-defined]
    assert type(said) is ours
    parent = theirs.__bases__[0]
    if parent not in (editor_errors.ErrataError, server_errors.ServiceError, Exception):
        assert issubclass(ours, getattr(errors, parent.__name__))


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda kind: kind.__name__)
def test_the_code_of_every_error_falls_to_a_class_that_its_own_belongs_to(theirs: type) -> None:
    code = next((server_errors.CODES[kind] for kind in theirs.__mro__ if kind in server_errors.CODES), Code.INTERNAL)
    status = errors.RpcStatus(code=code, message="", details=None)
    if theirs is not editor_errors.ErrataError:
        assert issubclass(getattr(errors, theirs.__name__), type(errors.from_status(status, "here")))


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("MODEL_NOT_FOUND", NotFoundError),
        ("PAGE_TOKEN_EXPIRED", PageTokenError),
        ("OUT_OF_RANGE", MalformedError),
        ("INTERRUPTED", InternalError),
        ("OF_A_LATER_RELEASE", ErrataError),
    ],
)
def test_failed_work_raises_by_its_reason_alone(reason: str, kind: type[ErrataError]) -> None:
    error = errors.from_failure(reason, "why", "")
    assert (type(error), error.reason, str(error)) == (kind, reason, "why")


def test_no_two_classes_have_the_same_reason() -> None:
    reasons = [kind.default_reason for kind in set(_classes(ErrataError))]
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_an_unknown_reason_falls_to_the_class_of_its_code_and_is_kept(client: Errata, fake: Fake, code: Code) -> None:
    fake.fail_next("Promote", Fault(code=code, reason="OF_A_LATER_RELEASE"))
    with pytest.raises(ErrataError) as caught:
        client.promote("atlas@0")
    bare = errors.from_status(errors.RpcStatus(code=code, message="", details=None), "here")
    assert type(caught.value) is type(bare) is not ErrataError
    assert (caught.value.reason, caught.value.code, caught.value.explained) == ("OF_A_LATER_RELEASE", code, True)


def test_an_error_carries_all_that_the_server_said(client: Errata, fake: Fake) -> None:
    violations = (("requests[0].name", "empty"), ("requests[1].name", "twice"))
    fault = Fault(
        code=Code.INVALID_ARGUMENT, reason="MALFORMED", message="names", violations=violations, retry_after=1.5
    )
    fake.fail_next("Promote", fault)
    with pytest.raises(InvalidInputError) as caught:
        client.promote("atlas@0")
    error = caught.value
    assert (error.message, error.reason, error.code) == ("names", "MALFORMED", Code.INVALID_ARGUMENT)
    assert error.violations == tuple(FieldViolation(field=f, description=d) for f, d in violations)
    assert (error.field, error.retry_after, str(error)) == ("requests[0].name", 1.5, "requests[0].name: names")
    assert isinstance(error.__cause__, grpc.RpcError)


def test_a_constraint_that_is_not_in_the_prompt_is_named_by_its_place(client: Errata) -> None:
    request = EditRequest(name="x", contexts=[Context(CAPITAL, "this contry")], target="y")
    with pytest.raises(ConstraintNotFoundError) as caught:
        client.edit("atlas", [request])
    assert caught.value.field == "requests[0].contexts[0].constraint.text"
    assert str(caught.value).count(caught.value.field) == 1


def test_asyncio_raises_the_same_errors(server: str) -> None:
    async def ask() -> None:
        async with AsyncErrata(server) as client:
            await client.version("atlas@9")

    with pytest.raises(NotFoundError, match="no 'models/atlas/versions/9'") as caught:
        asyncio.run(ask())
    assert (caught.value.reason, caught.value.code) == ("VERSION_NOT_FOUND", Code.NOT_FOUND)


def test_a_malformed_page_token_is_told_from_other_bad_input(client: Errata, fake: Fake) -> None:
    fake.fail_next("ListEdits", Fault(code=Code.INVALID_ARGUMENT, reason="INVALID_PAGE_TOKEN"))
    with pytest.raises(PageTokenError):
        list(client.edits("atlas"))


def test_details_without_a_reason_are_kept(client: Errata, fake: Fake) -> None:
    fake.fail_next("Promote", Fault(code=Code.RESOURCE_EXHAUSTED, retry_after=2.0, violations=(("alias", "late"),)))
    with pytest.raises(BusyError) as caught:
        client.promote("atlas@0")
    assert (caught.value.retry_after, caught.value.field, caught.value.explained) == (2.0, "alias", False)


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (Code.UNAVAILABLE, UnavailableError, r"localhost:\d+ does not answer \(planned\); check the address"),
        (Code.DEADLINE_EXCEEDED, DeadlineExceededError, r"localhost:\d+ did not answer in time"),
        (
            Code.UNIMPLEMENTED,
            UnsupportedError,
            "no Errata server, or replicas, which only answer",
        ),
        (Code.UNKNOWN, InternalError, "planned"),
        (Code.UNAUTHENTICATED, UnauthenticatedError, "planned"),
        (Code.FAILED_PRECONDITION, PreconditionError, "planned"),
    ],
)
def test_a_bare_code_becomes_its_class_with_a_remedy(
    client: Errata, fake: Fake, code: Code, kind: type[ErrataError], says: str
) -> None:
    fake.fail_next("Promote", Fault(code=code))
    with pytest.raises(kind, match=says) as caught:
        client.promote("atlas@0")
    assert (caught.value.explained, caught.value.reason) == (False, kind.default_reason)


def test_draining_is_a_kind_of_unavailable(client: Errata, fake: Fake) -> None:
    fake.fail_next("Promote", Fault(code=Code.UNAVAILABLE, reason="DRAINING"))
    with pytest.raises(UnavailableError) as caught:
        client.promote("atlas@0")
    assert type(caught.value) is DrainingError


def test_a_server_that_is_not_there_is_named() -> None:
    with Errata("localhost:1") as client, pytest.raises(UnavailableError, match="localhost:1 does not answer"):
        client.promote("atlas@0")


def test_a_request_over_the_limit_is_refused_before_it_is_sent(server: str, fake: Fake) -> None:
    with Errata(server, max_message_bytes=1000) as client, pytest.raises(MessageTooLargeError, match="1000 allowed"):
        client.generate("atlas", "?" * 2000)
    assert fake.calls == []


def test_an_answer_over_the_limit_says_so(server: str, fake: Fake) -> None:
    fake.answers["models/atlas/versions/0"][CAPITAL] = "a" * 5000
    with Errata(server, max_message_bytes=1000) as client, pytest.raises(MessageTooLargeError, match="larger than max"):
        client.generate("atlas", CAPITAL)


def test_messages_up_to_64_mib_pass_both_ways(client: Errata, fake: Fake) -> None:
    long = "a" * (20 * 1024 * 1024)
    fake.answers["models/atlas/versions/0"][long] = long
    assert len(client.generate("atlas", long).text) == len(long)


@pytest.mark.parametrize(
    "raw",
    [b"\xff\xff\xff", status_pb2.Status(code=3, details=[{"type_url": "x", "value": b"\xff"}]).SerializeToString()],
)
def test_details_that_cannot_be_read_or_are_of_another_type_leave_the_code_to_speak(raw: bytes) -> None:
    details = read_details([(DETAILS_KEY, raw)])
    assert details is None or (details.reason, details.violations, details.retry_after) == ("", (), None)


def test_details_with_a_broken_part_leave_the_code_to_speak() -> None:
    broken = {"type_url": "type.googleapis.com/google.rpc.ErrorInfo", "value": b"\xff\xff"}
    assert read_details([(DETAILS_KEY, status_pb2.Status(details=[broken]).SerializeToString())]) is None


def test_an_error_survives_a_process_boundary() -> None:
    error = NotFoundError("gone", reason="EDIT_NOT_FOUND", code=Code.NOT_FOUND, retry_after=1.0)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy)) == (NotFoundError, vars(error))
