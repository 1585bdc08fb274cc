"""Page tokens: where a list goes on, signed so that only this server's own are taken.

A token is bound to its list (method and parent, not the page's size) and good for one hour. Callers must not read
it; what it holds, an id or a number, is no secret.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from errata.server.errors import PageTokenError

_TAG = 16
_TIME = 8
_LONGEST = 1024


def _now() -> datetime:
    return datetime.now(UTC)


class PageTokens:
    """Issues and reads tokens. Servers that share a `secret` take each other's. Safe from any thread."""

    def __init__(
        self, secret: bytes, *, clock: Callable[[], datetime] = _now, lifetime: timedelta = timedelta(hours=1)
    ) -> None:
        self._secret, self._clock, self._lifetime = secret, clock, lifetime

    def issue(self, method: str, parent: str, position: str) -> str:
        """A token that goes on after `position` in the list of `parent` that `method` gives."""
        expiry = int((self._clock() + self._lifetime).timestamp())
        payload = expiry.to_bytes(_TIME, "big") + position.encode()
        return _encoded(self._tag(method, parent, payload) + payload)

    def read(self, token: str, method: str, parent: str, field: str = "page_token") -> str | None:
        """The position to go on after; None for the empty token of a first page. Raises PageTokenError."""
        if not token:
            return None
        raw = _decoded(token)
        tag, payload = raw[:_TAG], raw[_TAG:]
        if len(payload) < _TIME or not hmac.compare_digest(tag, self._tag(method, parent, payload)):
            raise PageTokenError(
                "the page token was not issued for this list; give the next_page_token of the answer before with "
                "the same parent, or leave it out to begin again",
                field=field,
            )
        if self._clock().timestamp() > int.from_bytes(payload[:_TIME], "big"):
            raise PageTokenError(
                f"the page token has expired, it was good for {self._lifetime}; leave it out to begin again",
                field=field,
                reason="PAGE_TOKEN_EXPIRED",
            )
        return payload[_TIME:].decode()

    def _tag(self, method: str, parent: str, payload: bytes) -> bytes:
        # Lengths first: no two lists may sign the same bytes.
        head = f"{len(method)} {len(parent)} {method}{parent}".encode()
        return hmac.digest(self._secret, head + payload, hashlib.sha256)[:_TAG]


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decoded(token: str) -> bytes:
    """Its bytes; none where it is no token. Only the one spelling that `_encoded` gives is taken."""
    if len(token) > _LONGEST or not token.isascii():
        return b""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return b""
    return raw if _encoded(raw) == token else b""
