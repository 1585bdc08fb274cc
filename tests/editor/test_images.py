import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from errata.editor.errors import ImageError
from errata.editor.images import ImageLimits, open_image, sha256_of

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
MAGIC = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x10\x00\x00\x00WEBPVP8 ", b"GIF89a", b"BM", b"II*\0", b"MM\0*"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_announcing(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return MAGIC[0] + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiff_of_one_pixel_with_a_tile(side: int) -> bytes:
    data = zlib.compress(bytes(side * side), 9)
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


VALID = [encoded(noise(), kind) for kind in FORMATS] + [
    encoded(noise(), "JPEG", progressive=True),
    encoded(noise(), "TIFF", compression="tiff_lzw"),
    encoded(noise(), "WEBP", lossless=True),
    encoded(noise().convert("P"), "PNG", transparency=3),
    encoded(noise(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
]


def pixel(source: bytes | Image.Image) -> tuple[int, ...]:
    """The colour of the upper left corner."""
    return tuple(np.asarray(open_image(source))[0, 0].tolist())


# What is accepted


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_lossless_file_gives_back_its_pixels(kind: str) -> None:
    image = open_image(encoded(noise(), kind))
    assert (image.mode, image.tobytes()) == ("RGB", noise().tobytes())


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_a_path_and_a_string_give_the_same_image(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(), kind)
    (tmp_path / "picture").write_bytes(data)
    images = [open_image(source) for source in (data, tmp_path / "picture", str(tmp_path / "picture"))]
    assert [image.mode for image in images] == ["RGB"] * 3
    assert len({sha256_of(image) for image in images}) == 1


def test_a_pillow_image_is_copied_and_left_as_it_is() -> None:
    source = noise()
    image = open_image(source)
    image.putpixel((0, 0), RED)
    assert source.tobytes() == noise().tobytes()


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3), (3, 5, 4), (1, 1)])
def test_an_array_of_bytes_is_an_image(shape: tuple[int, ...]) -> None:
    image = open_image(np.full(shape, 255, np.uint8))
    assert (image.mode, image.size, pixel(image)) == ("RGB", (shape[1], shape[0]), WHITE)


def test_an_array_that_is_a_view_keeps_its_order() -> None:
    pixels = np.asarray(noise())
    assert np.array_equal(np.asarray(open_image(pixels[::-1, ::2])), pixels[::-1, ::2])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_single_pixel_is_an_image(kind: str) -> None:
    assert open_image(encoded(Image.new("RGB", (1, 1)), kind)).size == (1, 1)


# How it is converted


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 90, (90, 90, 90)),
        ("LA", (0, 0), WHITE),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 2), colour)
    assert pixel(image) == pixel(encoded(image)) == expected


def test_cmyk_is_not_inverted() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixel(encoded(ink, "TIFF")) == RED
    red, green, blue = pixel(encoded(ink, "JPEG"))
    assert red > 250 > 5 > max(green, blue)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_transparent_palette_entry_is_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    opened = open_image(encoded(image, transparency=transparency))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]


def test_a_transparent_colour_is_white() -> None:
    assert pixel(encoded(Image.new("RGB", (1, 1), RED), transparency=RED)) == WHITE
    assert pixel(encoded(Image.new("L", (1, 1), 7), transparency=7)) == WHITE
    assert pixel(encoded(Image.new("1", (1, 1), 0), transparency=0)) == WHITE
    assert pixel(encoded(Image.new("I;16", (1, 1), 700), transparency=700)) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    levels = np.array([[0, 128, 129, 32896, 65535]], np.uint16)
    image = open_image(encoded(Image.fromarray(levels), kind))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bits_may_be_big_endian() -> None:
    assert pixel(Image.frombytes("I;16B", (1, 1), b"\x80\x80")) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[:16, 24:], corners[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # How a camera held this way stores the upright picture: the inverse of what the viewer does.
    rows = {
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners),
        7: corners[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(corners, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = open_image(encoded(Image.fromarray(rows), kind, exif=exif))
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image)[4::24, 4::40].astype(int) - corners[4::24, 4::40]).max() < 40
    assert sha256_of(open_image(image)) == sha256_of(image), "opened twice, it must not be turned twice"


@pytest.mark.filterwarnings("default")
def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    assert open_image(encoded(noise(), exif=b"Exif\0\0nonsense")).tobytes() == noise().tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    red, _, blue = pixel(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert red > 240 > 15 > blue


# What is refused


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(kind: str) -> None:
    data = encoded(noise(), kind)
    for end in (1, 20, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError):
            open_image(data[:end])


def test_pillow_told_to_accept_truncated_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        open_image(VALID[0][:500])


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
@pytest.mark.parametrize("setting", ["error", "always"])
def test_a_bomb_is_refused_by_its_header_without_a_warning(side: int, setting: str) -> None:
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter(setting)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match=f"{side}×{side}, over the limit of 64000000 pixels"):
            open_image(png_announcing(side, side))
    assert leaked == []


def test_a_small_tiff_with_a_huge_tile_is_a_bomb() -> None:
    with pytest.raises(ImageError, match="9000×9000"):
        open_image(tiff_of_one_pixel_with_a_tile(9_000))


@pytest.mark.parametrize("source", [noise(), np.asarray(noise()), VALID[0]])
def test_the_pixel_limit_binds_every_kind_of_source(source: bytes) -> None:
    assert open_image(source, limits=ImageLimits(max_pixels=1200)).size == (40, 30)
    with pytest.raises(ImageError, match="40×30, over the limit of 1199 pixels"):
        open_image(source, limits=ImageLimits(max_pixels=1199))


def test_the_byte_limit_binds_bytes_and_files(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(VALID[0])
    for source in (VALID[0], tmp_path / "picture.png"):
        assert open_image(source, limits=ImageLimits(max_bytes=len(VALID[0])))
        with pytest.raises(ImageError, match=r"more than \d+ bytes"):
            open_image(source, limits=ImageLimits(max_bytes=len(VALID[0]) - 1))


def test_only_the_allowed_formats_are_opened() -> None:
    limits = ImageLimits(formats=("PNG",))
    assert open_image(encoded(noise()), limits=limits)
    for data in (encoded(noise(), "JPEG"), encoded(noise(), "PPM"), b"%PDF-1.7 is not an image"):
        with pytest.raises(ImageError, match="none of PNG; save it as one of these"):
            open_image(data, limits=limits)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "is empty"),
        ("no/such/picture.png", "there is no file"),
        ("a\0b", "there is no file"),
        ("x" * 5000, "cannot be read"),
        (".", "there is no file"),
        (png_announcing(0, 5), "cannot be decoded"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
        (Image.new("F", (2, 2)), "which value is white"),
        (Image.new("I", (2, 2)), "which value is white"),
        (np.zeros((2, 2, 3)), "float64"),
        (np.zeros((2, 2), bool), "bool"),
        (np.zeros((2, 2), np.uint16), "uint16"),
        (np.zeros((3, 2, 2), np.uint8), "shape"),
        (np.zeros((1, 2, 2, 3), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (None, "NoneType is no image"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(source: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as refused:
        open_image(source, field="requests[2].image")
    assert refused.value.field == "requests[2].image"


def test_a_closed_pillow_image_is_refused() -> None:
    image = Image.open(io.BytesIO(VALID[0]))
    image.close()
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_image(image)


def opened_or_refused(data: bytes) -> None:
    try:
        image = open_image(data)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.width * image.height > 0


@given(st.sampled_from([b"", *MAGIC]), st.binary(max_size=400))
def test_random_bytes_are_an_rgb_image_or_an_image_error(magic: bytes, rest: bytes) -> None:
    opened_or_refused(magic + rest)


@given(st.sampled_from(VALID), st.integers(min_value=0, max_value=5000))
def test_a_cut_file_is_an_rgb_image_or_an_image_error(data: bytes, end: int) -> None:
    opened_or_refused(data[: end % len(data)])


@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_an_rgb_image_or_an_image_error(data: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for at, byte in damage:
        damaged[at % min(len(data), 300)] = byte  # the first bytes are headers and tables, where it hurts
    opened_or_refused(bytes(damaged))


# What is shared


def test_threads_get_the_same_image_and_no_setting_changes() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: sha256_of(open_image(VALID[1])), range(64)))
    assert len(names) == 1
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_a_hash_tells_mode_size_pixels_and_palette_apart() -> None:
    images = [
        Image.new("RGB", (2, 3)),
        Image.new("RGB", (3, 2)),
        Image.new("L", (6, 3)),
        Image.new("RGB", (2, 3), RED),
    ]
    for colour in (10, 20):
        images.append(Image.new("P", (2, 3)))
        images[-1].putpalette([colour] * 3)
    assert len({sha256_of(image) for image in images}) == len(images)
    assert sha256_of(images[0]) == sha256_of(images[0].copy())
