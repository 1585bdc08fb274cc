import json
from datetime import datetime, timedelta, timezone

import pytest
from ledgers import Clock
from sqlalchemy import text

from errata.server.errors import MalformedError, NotFoundError
from errata.server.ledger.ledger import Ledger


def test_entries_come_from_the_newest_to_the_oldest_page_by_page(ledger: Ledger) -> None:
    for n in range(5):
        ledger.record("ada", f"step.{n}", "atlas", "models/atlas", {"n": n})
    ledger.record("ada", "step", "mars", "models/mars", {})
    first = ledger.audit("atlas", None, 3)
    second = ledger.audit("atlas", first[-1].id, 3)
    assert [json.loads(entry.details)["n"] for entry in (*first, *second)] == [4, 3, 2, 1, 0]
    assert ledger.audit("atlas", second[-1].id, 3) == []


def test_times_come_back_aware_and_in_utc(ledger: Ledger, clock: Clock) -> None:
    clock.now = datetime(2030, 7, 1, 1, 30, 0, 123456, timezone(timedelta(hours=5, minutes=45)))
    ledger.record("ada", "a", "atlas", "r", {})
    time = ledger.audit("atlas", None, 1)[0].time
    assert time == clock.now
    assert time.utcoffset() == timedelta(0)


def test_a_time_without_a_zone_is_refused(ledger: Ledger, clock: Clock) -> None:
    clock.now = datetime(2030, 7, 1)
    with pytest.raises(Exception, match="no time zone"):
        ledger.record("ada", "a", "atlas", "r", {})
    assert ledger.audit("atlas", None, 1) == []


def test_a_token_is_known_by_its_secret(ledger: Ledger, clock: Clock) -> None:
    secret = ledger.create_token("ci", {"atlas": "editor", "*": "reader"})
    caller = ledger.caller(secret)
    assert caller is not None
    assert (caller.name, caller.roles, caller.revoked) == ("ci", {"atlas": "editor", "*": "reader"}, False)
    assert caller.create_time == clock.now
    for wrong in ("", "errata_", secret[:-1], secret + "A", secret.removeprefix("errata_"), secret.swapcase()):
        assert ledger.caller(wrong) is None


def test_secrets_are_long_random_and_recognisable(ledger: Ledger) -> None:
    secrets = {ledger.create_token(f"t{n}", {"*": "reader"}) for n in range(20)}
    assert len(secrets) == 20
    assert all(secret.startswith("errata_") and len(secret) == len("errata_") + 43 for secret in secrets)


def test_no_secret_is_stored(ledger: Ledger) -> None:
    secret = ledger.create_token("ci", {"*": "admin"})
    with ledger._engine.connect() as connection:
        stored = connection.execute(text("SELECT * FROM errata_tokens")).one()
    assert secret.removeprefix("errata_") not in repr(stored)
    assert secret.removeprefix("errata_") not in ledger.audit("", None, 1)[0].details


def test_a_revoked_token_opens_nothing(ledger: Ledger) -> None:
    secret, other = ledger.create_token("ci", {"*": "admin"}), ledger.create_token("dev", {"*": "reader"})
    ledger.revoke_token("ci")
    ledger.revoke_token("ci")
    assert ledger.caller(secret) is None
    assert ledger.caller(other) is not None
    assert [(token.name, token.revoked) for token in ledger.tokens()] == [("ci", True), ("dev", False)]
    with pytest.raises(NotFoundError):
        ledger.revoke_token("nobody")


def test_tokens_are_in_the_service_wide_audit(ledger: Ledger) -> None:
    ledger.create_token("ci", {"*": "admin"}, actor="root")
    ledger.revoke_token("ci", actor="root")
    ledger.revoke_token("ci", actor="root")
    entries = ledger.audit("", None, 10)
    assert [(entry.actor, entry.action, entry.resource) for entry in entries] == [
        ("root", "token.revoke", "tokens/ci"),
        ("root", "token.create", "tokens/ci"),
    ]


def test_a_callers_name_is_never_given_to_another(ledger: Ledger) -> None:
    ledger.create_token("ci", {"*": "admin"})
    ledger.revoke_token("ci")
    with pytest.raises(MalformedError) as refused:
        ledger.create_token("ci", {"*": "reader"})
    assert refused.value.said_reason == "TOKEN_EXISTS"


@pytest.mark.parametrize(("name", "roles"), [("", {"*": "reader"}), ("a", {}), ("a", {"*": "root"}), ("a", {"m": ""})])
def test_a_token_without_a_name_or_a_known_role_is_refused(ledger: Ledger, name: str, roles: dict[str, str]) -> None:
    with pytest.raises(MalformedError):
        ledger.create_token(name, roles)
    assert ledger.tokens() == []
