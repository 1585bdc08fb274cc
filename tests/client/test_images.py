"""Pictures as path, bytes, PIL image or array, and everything that is none."""

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fake_server import Fake
from PIL import Image

from errata.client import Errata, ImageError, ImageLike, ImageUri, Prompt
from errata.client.images import image_message


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_noise((5, 3), 60).convert("RGB")


def _decoded(image: ImageLike) -> Image.Image:
    return Image.open(BytesIO(image_message(image, "image").data))


def test_a_file_is_sent_as_it_is(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "flag.webp"
    picture.save(path)
    assert image_message(path, "image").data == image_message(str(path), "image").data == path.read_bytes()


@pytest.mark.parametrize("given", [b"\x89PNG", bytearray(b"\x89PNG"), memoryview(b"\x89PNG")])
def test_bytes_are_sent_as_they_are(given: bytes) -> None:
    assert image_message(given, "image").data == b"\x89PNG"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_pil_image_keeps_its_pixels(picture: Image.Image, mode: str) -> None:
    given = picture.convert(mode)
    assert _decoded(given).convert("RGBA").tobytes() == given.convert("RGBA").tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "HSV", "LAB", "F", "YCbCr"])
def test_a_pil_image_that_png_cannot_hold_becomes_rgb(picture: Image.Image, mode: str) -> None:
    colours = picture.convert("L") if mode == "F" else picture
    assert _decoded(colours.convert(mode) if mode != "LAB" else Image.new("LAB", (5, 3))).mode == "RGB"


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3), (3, 5, 4)])
def test_an_array_keeps_its_pixels(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.asarray(_decoded(array)), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 5, 3)),
        np.zeros((3, 5, 2), np.uint8),
        np.zeros((3, 5, 7), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((0, 5), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="is no image; give height × width"):
        image_message(array, "image")


def test_an_array_without_pillow_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImageError, match="install pillow, or give the image's path or encoded bytes"):
        image_message(np.zeros((3, 5), np.uint8), "image")


def test_a_uri_is_left_to_the_server() -> None:
    message = image_message(ImageUri("file:///flag.png"), "image")
    assert (message.WhichOneof("source"), message.uri) == ("uri", "file:///flag.png")


@pytest.mark.parametrize("given", [None, 7, object(), [b"1"]])
def test_anything_else_is_refused_by_its_type(given: object) -> None:
    with pytest.raises(ImageError, match=f"cannot be given as {type(given).__name__}"):
        image_message(given, "image")  # type: ignore[arg-type]


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png' cannot be read: No such file or directory; check the path"):
        image_message(tmp_path / "nowhere.png", "image")
    with pytest.raises(ImageError, match="Is a directory"):
        image_message(tmp_path, "image")


def test_a_truncated_file_opened_by_pil_is_refused(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "flag.png"
    picture.resize((200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as opened, pytest.raises(ImageError, match="the image cannot be encoded"):
        image_message(opened, "image")


def test_an_error_names_the_image_at_fault_and_nothing_is_sent(client: Errata, fake: Fake) -> None:
    with pytest.raises(ImageError) as caught:
        client.generate("atlas", Prompt("?", [b"1", "nowhere.png"]))
    assert (caught.value.field, caught.value.reason) == ("prompt.images[1]", "INVALID_IMAGE")
    assert fake.calls == []


def test_one_image_is_no_list_of_its_letters(tmp_path: Path, client: Errata, fake: Fake) -> None:
    path = tmp_path / "flag.png"
    path.write_bytes(b"12")
    for one in (str(path), path, b"12"):
        client.generate("atlas", Prompt("?", one))
        assert [image.data for image in fake.requests[-1].prompt.images] == [b"12"]
