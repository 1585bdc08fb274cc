"""A bounded download over http or https that cannot be talked into reaching what only this machine can reach.

Every address of the host must be public, and the connection goes to the very address that was checked, so that a
name which means something else the next moment gains nothing. Redirects are followed, each checked like the first.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Timer
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

_MOST_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")


class DownloadError(Exception):
    """It was refused or failed; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class _Redirect:
    to: str


def download(
    url: str,
    *,
    schemes: Collection[str],
    max_bytes: int,
    timeout: float,
    private_addresses: bool = False,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """What lies at `url`, at most `max_bytes` and within `timeout` seconds in all. Raises DownloadError.

    `context` verifies https servers; None: by the system's certificates. Looking up the host's name is bounded by
    the system's resolver, not by `timeout`.
    """
    until = monotonic() + timeout
    for _ in range(_MOST_REDIRECTS + 1):
        parts = _checked(url, schemes)
        address = _address(parts, private_addresses)
        try:
            found = _get(parts, address, max_bytes, until, context)
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = monotonic() >= until
            why = f"it took longer than {timeout:g} s" if late else f"{type(error).__name__}: {error}"
            raise DownloadError(
                f"the image cannot be fetched from {parts.hostname!r} ({why}); check the URI"
            ) from error
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found.to)
    raise DownloadError(f"the URI redirects more than {_MOST_REDIRECTS} times; give the image's own address")


def _checked(url: str, schemes: Collection[str]) -> SplitResult:
    # Control characters would be dropped by the parser, and blanks would end the request line.
    if not url.isascii() or not url.isprintable() or " " in url:
        raise DownloadError("the URI holds characters that no URI may hold; percent-encode them")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"the URI cannot be read ({error}); correct it") from error
    if parts.scheme not in schemes:
        raise DownloadError(f"the URI leads to the scheme {parts.scheme[:20]!r}, which the server does not allow")
    if not host or parts.username is not None or parts.password is not None:
        raise DownloadError("the URI must name a host, and no user or password; give https://HOST/PATH")
    return parts


def _address(parts: SplitResult, private_addresses: bool) -> str:
    """The address to connect to: the host's first, once all of them are allowed."""
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise DownloadError(f"there is no host {host!r}; check the URI") from error
    if not found or (not private_addresses and not all(map(is_public, found))):
        raise DownloadError(f"the server may not fetch from {host!r}: it is no public address; send the image's bytes")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to one machine on the internet; not where it is a way round to another one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a scope, as only link-local ones have
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _PUBLIC_V6 or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


def _get(
    parts: SplitResult, address: str, max_bytes: int, until: float, context: ssl.SSLContext | None
) -> bytes | _Redirect:
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or _PORTS[parts.scheme])
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with _connected(parts, address, until, context) as connection.sock:
        headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            if response.status in (301, 302, 303, 307, 308):
                return _Redirect(response.headers.get("Location", ""))
            if response.status != http.client.OK:
                raise DownloadError(f"{parts.hostname!r} answers {response.status} {response.reason}; check the URI")
            body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise DownloadError(f"the image has more than {max_bytes} bytes; make it smaller")
    return body


@contextmanager
def _connected(
    parts: SplitResult, address: str, until: float, context: ssl.SSLContext | None
) -> Iterator[socket.socket]:
    """A connection that is cut at `until`: a timeout of the socket alone would begin anew with every byte."""
    left = until - monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.create_connection((address, parts.port or _PORTS[parts.scheme]), timeout=left)
    if parts.scheme == "https":
        context = context or ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
    timer = Timer(max(0.0, until - monotonic()), _cut, (sock,))
    timer.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        yield sock
        if monotonic() >= until:
            raise TimeoutError
    finally:
        timer.cancel()
        sock.close()


def _cut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not the TLS socket's own: that one waits for the other side
    except OSError:  # closed already
        return
