"""Pictures for a page: small copies, each distinct one encoded and stored once, as a class of the style sheet."""

import base64
import io

from PIL import Image

from errata.editor.images import sha256_of

BUDGET = 3_500_000
"""Bytes of all pictures of one page, as written: about 1,100 photographs of 96 × 96 pixels."""


def data_uri(content: bytes, kind: str) -> str:
    """Bytes of an image as a data URI; `kind` is `png` or `webp`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


class Pictures:
    """Hands out a class name for each picture; equal pictures share theirs. Full after `budget` bytes."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._left = budget
        self._classes: dict[str, str] = {}
        self.uris: dict[str, str] = {}

    def css_class(self, image: Image.Image, side: int = 96, *, new: bool = True) -> str | None:
        """The class that shows `image`, at most `side` pixels wide and high.

        None where no more fit, or where `new` is False and the picture is not there yet.
        """
        side = min(side, max(image.size))
        key = f"{sha256_of(image)} {side}"
        if key in self._classes:
            return self._classes[key]
        if not new or self._left <= 0:
            return None
        name = self._classes[key] = f"p{len(self._classes)}"
        self.uris[name] = data_uri(_webp(image, side), "webp")
        self._left -= len(self.uris[name])
        return name


def _webp(image: Image.Image, side: int) -> bytes:
    small = image.convert("RGBA")
    small.thumbnail((side, side))
    on_white = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    buffer = io.BytesIO()
    on_white.save(buffer, "WEBP", quality=70, method=4)
    return buffer.getvalue()
