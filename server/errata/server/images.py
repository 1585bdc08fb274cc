"""Images as a request gives them: bytes, or a URI of a scheme that the settings allow; decoded under limits.

Knows nothing about prompts. Fetching blocks: decode in a thread, not in the event loop.
"""

import base64
import binascii
import os
import stat
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Self
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image

from errata.editor.errors import ImageError
from errata.editor.images import ImageLimits, open_image
from errata.server.download import DownloadError, download
from errata.server.errors import BusyError
from errata.server.settings import Settings
from errata.v1 import common_pb2

_DECODERS = 4
"""Images decoded at once: each takes several times its own memory for a moment."""

_CALLS_WORTH = 3
"""Full calls whose images fit in memory together: each image is there twice while its prompt is made."""

_RETRY_SECONDS = 1.0


class PixelBudget:
    """The pixels of all images that a server's calls hold together, 3 bytes of memory each. Safe from any thread.

    A few kilobytes can be an image of many megabytes, and many calls can wait with theirs.
    """

    def __init__(self, most: int) -> None:
        self.decoding = BoundedSemaphore(_DECODERS)
        self._most, self._held = most, 0
        self._lock = Lock()
        self._gone: deque[int] = deque()  # an image can end in any thread, at any moment: also under the lock

    def hold(self, image: Image.Image) -> None:
        """Counts an image for as long as it lives. Raises BusyError where it is one too many."""
        pixels = image.width * image.height
        with self._lock:
            while self._gone:
                self._held -= self._gone.popleft()
            if self._held + pixels > self._most:
                raise BusyError(
                    "the images of the calls being answered fill the memory that there is for them; come back in a "
                    "moment, or send smaller images",
                    retry_after=_RETRY_SECONDS,
                )
            self._held += pixels
        weakref.finalize(image, self._gone.append, pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePolicy:
    """Which images are taken.

    `schemes` are those of URIs. `file:` images must lie below `folders`, links followed. `private_addresses` lets
    `http` and `https` reach this machine and private networks. `request_pixels` bounds all images of one call, and
    `budget` those of all calls at once; None for work that something else bounds.
    """

    limits: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=10_000_000, max_pixels=25_000_000))
    schemes: frozenset[str] = frozenset()
    folders: tuple[Path, ...] = ()
    private_addresses: bool = False
    timeout_seconds: float = 10.0
    request_pixels: int = 250_000_000
    budget: PixelBudget | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The policy of a server."""
        return cls(
            limits=ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            schemes=frozenset(settings.image_schemes),
            folders=settings.image_folders,
            private_addresses=settings.image_private_addresses,
            timeout_seconds=settings.image_timeout_seconds,
            request_pixels=settings.max_request_pixels,
        )

    def within_budget(self) -> Self:
        """The same policy for calls, which come as they like, with a budget for all of them."""
        return replace(self, budget=PixelBudget(_CALLS_WORTH * self.request_pixels))

    def open(self, image: common_pb2.Image, field: str) -> Image.Image:
        """The decoded image, upright, RGB. Raises ImageError, BusyError."""
        encoded = self.encoded(image, field)
        with self.budget.decoding if self.budget else nullcontext():
            found = open_image(encoded, field=_source(image, field), limits=self.limits)
            self.hold(found)
        return found

    def hold(self, *images: Image.Image) -> None:
        """Counts images that a call holds. Raises BusyError where they are too many."""
        if self.budget:
            for image in images:
                self.budget.hold(image)

    def for_call(self) -> Callable[[common_pb2.Image, str], Image.Image]:
        """Opens the images of one call, which share `request_pixels`: small files can hold much."""
        spent = 0

        def opened(image: common_pb2.Image, field: str) -> Image.Image:
            nonlocal spent
            found = self.open(image, field)
            spent += found.width * found.height
            if spent > self.request_pixels:
                raise ImageError(
                    f"the call's images have more than {self.request_pixels} pixels together; make them smaller, or "
                    "make several calls",
                    field=field,
                )
            return found

        return opened

    def encoded(self, image: common_pb2.Image, field: str) -> bytes:
        """The image's file, fetched where it is given as a URI; not decoded. Raises ImageError."""
        match image.WhichOneof("source"):
            case "data":
                return image.data
            case "uri":
                return self._fetched(image.uri, f"{field}.uri")
            case _:
                raise ImageError("the image is empty; set data or uri", field=field)

    def _fetched(self, uri: str, field: str) -> bytes:
        scheme = uri.partition(":")[0].lower()
        fetch: dict[str, Callable[[str, str], bytes]] = {
            "data": self._from_data,
            "file": self._from_file,
            "http": self._from_network,
            "https": self._from_network,
        }
        if scheme not in self.schemes or scheme not in fetch:
            allowed = f"it takes {', '.join(sorted(self.schemes))}, or" if self.schemes else "it takes no URIs:"
            raise ImageError(
                f"the server's settings do not allow images by {scheme[:20]!r}; {allowed} send the image's bytes as "
                "`data`",
                field=field,
            )
        return fetch[scheme](uri, field)

    def _from_data(self, uri: str, field: str) -> bytes:
        head, comma, body = uri.partition(",")
        if not comma:
            raise ImageError("the data: URI has no comma; give data:image/png;base64,… or bytes", field=field)
        if len(body) > 4 * self.limits.max_bytes:
            raise ImageError(f"the image has more than {self.limits.max_bytes} bytes; make it smaller", field=field)
        try:
            encoded = head.lower().endswith(";base64")
            return base64.b64decode(unquote(body), validate=True) if encoded else unquote_to_bytes(body)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"the data: URI is not base64 ({error}); encode it again", field=field) from error

    def _from_file(self, uri: str, field: str) -> bytes:
        path = self._path(uri)
        if path is None:
            raise ImageError(
                "the server reads no images there; give file:///PATH below one of its image folders", field=field
            )
        return _read(path, self.limits.max_bytes, field)

    def _path(self, uri: str) -> Path | None:
        """The path that a file: URI names, links resolved; None where it is not below one of the folders."""
        try:
            parts = urlsplit(uri)
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
                return None
            path = Path(unquote(parts.path, errors="strict")).resolve()
            return path if any(path.is_relative_to(f.resolve()) for f in self.folders) else None
        except (OSError, ValueError, RuntimeError):  # a NUL byte, no UTF-8, links in a circle
            return None

    def _from_network(self, uri: str, field: str) -> bytes:
        try:
            return download(
                uri,
                schemes=self.schemes & {"http", "https"},
                max_bytes=self.limits.max_bytes,
                timeout=self.timeout_seconds,
                private_addresses=self.private_addresses,
            )
        except DownloadError as error:
            raise ImageError(str(error), field=field) from error


def _source(image: common_pb2.Image, field: str) -> str:
    return f"{field}.{image.WhichOneof('source')}"


def _read(path: Path, max_bytes: int, field: str) -> bytes:
    """A regular file's content, one byte more than allowed at most. A link or pipe put there meanwhile is not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - it is open already
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ImageError("the URI names no regular file; give one that is", field=field)
            return file.read(max_bytes + 1)
    except OSError as error:
        raise ImageError(
            f"the file cannot be read ({error.strerror}); check its path and permissions", field=field
        ) from error
