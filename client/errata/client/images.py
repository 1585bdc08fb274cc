"""Pictures as the caller has them, encoded for the wire.

A path, encoded bytes, a PIL image, or a numpy array of uint8, height × width [× 3 or 4]. PIL and numpy are used where
the caller has imported them, and never imported for their own sake; to encode an array Pillow must be installed. A
picture that the server should find itself is an `ImageUri`. Limits of bytes and pixels are the server's.
"""

import sys
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from errata.client.errors import ImageError
from errata.v1.common_pb2 import Image as ImageMessage

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PilImage


@dataclass(frozen=True, slots=True)
class ImageUri:
    """Where the server finds a picture. It refuses every scheme that its settings do not allow."""

    uri: str


ImageLike: TypeAlias = "str | PathLike[str] | bytes | ImageUri | PilImage | np.ndarray"
"""A picture: its path, its encoded bytes, a PIL image, a numpy array of uint8, or an `ImageUri`."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def image_message(image: ImageLike, field: str) -> ImageMessage:
    """The picture for the wire. Raises ImageError, naming `field`, for what cannot be read or encoded."""
    if isinstance(image, ImageUri):
        return ImageMessage(uri=image.uri)
    return ImageMessage(data=_encoded(image, field))


def _encoded(image: object, field: str) -> bytes:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, PathLike)):
        return _read(Path(image), field)
    if _is(image, "PIL.Image", "Image"):
        return _png(image, field)  # type: ignore[arg-type]
    if _is(image, "numpy", "ndarray"):
        return _png(_from_array(image, field), field)  # type: ignore[arg-type]
    kinds = "a path, bytes, a PIL image, a numpy array or an ImageUri"
    raise ImageError.at(field, f"an image cannot be given as {type(image).__name__}; give {kinds}")


def _is(image: object, module: str, name: str) -> bool:
    # What was never imported cannot be what was given.
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(image, getattr(loaded, name))


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ImageError.at(field, f"image {str(path)!r} cannot be read: {reason}; check the path") from error


def _png(image: "PilImage", field: str) -> bytes:
    encoded = BytesIO()
    try:
        (image if image.mode in _PNG_MODES else image.convert("RGB")).save(encoded, format="PNG")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads lazily: a truncated file shows itself here.
        raise ImageError.at(field, f"the image cannot be encoded: {error}; check the file") from error
    return encoded.getvalue()


def _from_array(array: "np.ndarray", field: str) -> "PilImage":
    channels_fit = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != "uint8" or not channels_fit or 0 in array.shape:
        wanted = "height × width, or height × width × 3 or 4, of uint8 (0-255)"
        raise ImageError.at(field, f"an array of shape {array.shape} and type {array.dtype} is no image; give {wanted}")
    try:
        from PIL import Image
    except ImportError as error:
        remedy = "install pillow, or give the image's path or encoded bytes"
        raise ImageError.at(field, f"Pillow is needed to encode a numpy array; {remedy}") from error
    return Image.fromarray(array)
