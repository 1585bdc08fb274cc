"""Callers' tokens: 32 random bytes each, shown once; only the SHA-256 is kept."""

from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from secrets import token_urlsafe

from sqlalchemy import select

from errata.server.errors import MalformedError, NotFoundError
from errata.server.ledger.audit import write_down
from errata.server.ledger.database import Database
from errata.server.ledger.models import SERVER
from errata.server.ledger.rows import TokenRow
from errata.server.ledger.tables import Token

TOKEN_PREFIX = "errata_"
"""What every token begins with, so that scanners of leaked secrets know one."""

ROLES = ("reader", "editor", "admin")
"""Each may do what those before it may."""


class TokenLedger(Database):
    """Tokens. Changes land in the audit of the whole service."""

    def create_token(self, name: str, roles: Mapping[str, str], *, actor: str = SERVER) -> str:
        """Returns a new caller's secret, which nobody can be shown again.

        `roles` maps a model's name, or "*" for all, to reader, editor or admin.

        Raises MalformedError: no name (MISSING_FIELD), no roles or an unknown one (MALFORMED_ROLES), a name that a
        token has or had (TOKEN_EXISTS): the audit tells callers apart by their names.
        """
        _check(name, roles)
        secret = f"{TOKEN_PREFIX}{token_urlsafe(32)}"
        with self._write.begin() as session:
            if session.get(Token, name) is not None:
                raise MalformedError(
                    f'there is or was a token "{name}"; names are not used again, take another',
                    field="name",
                    reason="TOKEN_EXISTS",
                )
            session.add(Token(name=name, sha256=_hash(secret), roles=dict(roles), create_time=self._now()))
            write_down(
                session,
                self._now(),
                actor=actor,
                action="token.create",
                model="",
                resource=f"tokens/{name}",
                details={"roles": dict(roles)},
            )
        return secret

    def revoke_token(self, name: str, *, actor: str = SERVER) -> None:
        """The token opens nothing from now on. Idempotent. Raises NotFoundError (TOKEN_NOT_FOUND)."""
        with self._write.begin() as session:
            token = session.get(Token, name, with_for_update=True)
            if token is None:
                raise NotFoundError(f'there is no token "{name}"', reason="TOKEN_NOT_FOUND")
            if token.revoke_time is None:
                token.revoke_time = self._now()
                write_down(
                    session, self._now(), actor=actor, action="token.revoke", model="", resource=f"tokens/{name}"
                )

    def tokens(self) -> list[TokenRow]:
        """All callers by name, the revoked ones too."""
        with self._read() as session:
            return [_row(token) for token in session.scalars(select(Token).order_by(Token.name))]

    def caller(self, secret: str) -> TokenRow | None:
        """Whose token it is; None if it is nobody's or was revoked.

        How long the look-up takes can only tell of the secret's hash, from which the next guess does not follow.
        """
        digest = _hash(secret)
        with self._read() as session:
            token = session.scalar(select(Token).where(Token.sha256 == digest, Token.revoke_time.is_(None)))
            return _row(token) if token is not None and compare_digest(token.sha256, digest) else None


def _check(name: str, roles: Mapping[str, str]) -> None:
    if not name:
        raise MalformedError("a token needs a name", field="name", reason="MISSING_FIELD")
    if not roles or not set(roles.values()) <= set(ROLES):
        raise MalformedError(
            f'a token needs roles, by model\'s name or "*", each one of {", ".join(ROLES)}; these are {dict(roles)}',
            field="roles",
            reason="MALFORMED_ROLES",
        )


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _row(token: Token) -> TokenRow:
    return TokenRow(
        name=token.name, roles=dict(token.roles), create_time=token.create_time, revoked=token.revoke_time is not None
    )
