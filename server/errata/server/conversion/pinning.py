"""A request as a job keeps it: with the images themselves in place of their URIs.

What lies at a URI may be another thing a moment later, and a job that is done again must do the same.
"""

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import Message

from errata.editor.errors import ImageError
from errata.editor.images import open_image
from errata.server.conversion.limits import joined
from errata.server.images import ImagePolicy
from errata.v1 import common_pb2

M = TypeVar("M", bound=Message)

_MOST_BYTES = 64 * 2**20
"""Of all images that one call names by URI: it is kept whole, like one that brings them."""


def pinned(message: M, images: ImagePolicy) -> M:
    """A copy in which every image is there as bytes. Each URI is fetched once, and what lies there decoded. Blocks.

    Raises ImageError.
    """
    copy = type(message)()
    copy.CopyFrom(message)
    fetched: dict[str, bytes] = {}
    nbytes = 0
    for image, field in _images(copy):
        if image.WhichOneof("source") != "uri":
            continue
        if image.uri not in fetched:
            fetched[image.uri] = _fetched(image, field, images)
        image.data = fetched[image.uri]
        nbytes += len(image.data)
        if nbytes > _MOST_BYTES:
            raise ImageError(
                f"the images up to here have more than {_MOST_BYTES} bytes together; make them smaller, or make "
                "several calls",
                field=f"{field}.uri",
            )
    return copy


def _fetched(image: common_pb2.Image, field: str, images: ImagePolicy) -> bytes:
    data = images.encoded(image, field)
    open_image(data, field=f"{field}.uri", limits=images.limits)
    return data


def _images(message: Message, field: str = "") -> Iterator[tuple[common_pb2.Image, str]]:
    """Every image of a message, in order, and the field where it stands."""
    if isinstance(message, common_pb2.Image):
        yield message, field
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        where = joined(field, descriptor.name)
        parts = [(v, f"{where}[{i}]") for i, v in enumerate(value)] if descriptor.is_repeated else [(value, where)]
        for inner, at in parts:
            yield from _images(inner, at)
