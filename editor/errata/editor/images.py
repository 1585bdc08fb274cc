"""Whatever a caller calls an image, as a decoded RGB image. Knows nothing about models or processors.

Architecture invariant: no process-wide setting is read or changed, so calls may run in any thread. This is why files
go to Pillow's decoders directly and not through `Image.open`: that one reports large images through the warning
filters, which all threads share.
"""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile

from errata.editor.errors import ImageError

ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
ImageSource = bytes | str | os.PathLike[str] | Image.Image | np.ndarray

# What undoes each EXIF orientation (EXIF 2.32, §4.6.4 A); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What `open_image` accepts.

    `max_bytes` bounds an encoded file, `max_pixels` is width × height and bounds what decoding it may allocate.
    `formats` are tried in this order and bind encoded files only.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    formats: tuple[ImageFormat, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


_DEFAULT_LIMITS = ImageLimits()


def open_image(source: ImageSource, *, field: str = "image", limits: ImageLimits = _DEFAULT_LIMITS) -> Image.Image:
    """A new RGB image: upright, on white where it was transparent, of an animation the first frame.

    `source` is a file's content or its path, a Pillow image (left as it is, at its current frame), or a uint8 array
    H×W, H×W×3 (RGB) or H×W×4 (RGBA). Raises ImageError, and nothing else, where it cannot be used.
    """
    try:
        image = _undecoded(source, limits)
        _check_size(image, limits)
        return _rgb(image)
    except _UnusableError as error:
        raise ImageError(str(error), field=field) from error.__cause__
    # A decoder meets hostile bytes with OSError, SyntaxError, ValueError, struct.error, zlib.error and others.
    except Exception as error:
        raise ImageError(
            f"the image cannot be decoded ({type(error).__name__}: {error}); it is truncated or damaged: "
            "save it again as an 8-bit PNG or JPEG",
            field=field,
        ) from error


def sha256_of(image: Image.Image) -> str:
    """Names an image by its mode, size and pixels (with the palette they point into, if any), in hexadecimal."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    digest.update(bytes(image.getpalette() or ()))
    return digest.hexdigest()


class _UnusableError(Exception):
    """An ImageError that does not know its field yet."""


def _undecoded(source: ImageSource, limits: ImageLimits) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _from_bytes(source, limits)
    if isinstance(source, str | os.PathLike):
        return _from_bytes(_read(Path(source), limits), limits)
    raise _UnusableError(f"{type(source).__name__} is no image; give bytes, a path, a Pillow image or an array")


def _read(path: Path, limits: ImageLimits) -> bytes:
    try:
        if not path.is_file():
            raise _UnusableError(f"there is no file {str(path)!r}; give the path of an image, or its bytes")
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)  # one more than allowed shows that there is more
    except OSError as error:
        raise _UnusableError(
            f"{str(path)!r} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


def _from_bytes(data: bytes, limits: ImageLimits) -> Image.Image:
    if not data:
        raise _UnusableError("the image is empty (0 bytes); give the content of an image file")
    if len(data) > limits.max_bytes:
        raise _UnusableError(f"the image has more than {limits.max_bytes} bytes; make it smaller")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise _UnusableError("LOAD_TRUNCATED_IMAGES would pass a truncated image off as whole; set it to False")
    Image.init()  # registers the decoders, once in a process
    for name in limits.formats:
        decoder, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16]) is True:
            return decoder(io.BytesIO(data), "")
    raise _UnusableError(
        f"the image, which starts with {data[:8]!r}, is none of {', '.join(limits.formats)}; save it as one of these"
    )


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise _UnusableError(f"the array is {pixels.dtype}; give uint8 values from 0 to 255")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or 0 in pixels.shape:
        raise _UnusableError(f"the array has shape {pixels.shape}; give H×W, H×W×3 or H×W×4, not empty")
    return Image.fromarray(pixels)


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    if 0 in image.size:
        raise _UnusableError(f"the image is {image.width}×{image.height}; it needs at least one pixel")
    # A TIFF of one pixel may announce a tile of millions (tags 322 and 323), which would be decoded whole.
    tags = getattr(image, "tag_v2", {})
    width, height = max(image.width, tags.get(322, 0)), max(image.height, tags.get(323, 0))
    if width * height > limits.max_pixels:
        raise _UnusableError(
            f"the image is {width}×{height}, over the limit of {limits.max_pixels} pixels; make it smaller"
        )


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    if image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.mode in ("I", "F"):
        raise _UnusableError(f"the image's mode {image.mode!r} says not which value is white; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info = {}  # with its EXIF block kept, the next reader would turn the image again
    return rgb if orientation not in _UPRIGHT else rgb.transpose(_UPRIGHT[orientation])


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whole pixels under damaged metadata: every viewer shows them unturned
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Maps 0 … 65535 to 0 … 255 with rounding; Pillow's own conversion clips at 255."""
    pixels = np.asarray(image).astype(np.uint32)
    if "transparency" in image.info:
        pixels[pixels == image.info["transparency"]] = 0xFFFF
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
