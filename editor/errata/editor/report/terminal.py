"""Pictures in a terminal: two pixels a character, by the upper half block's two colours."""

from PIL import Image
from rich.style import Style
from rich.text import Text


def thumbnail(image: Image.Image, columns: int = 12) -> Text:
    """The picture at `columns` characters, half as many lines high for a square. Blank where there is no colour."""
    lines = max(1, round(columns * image.height / image.width / 2))
    pixels = image.convert("RGB").resize((columns, 2 * lines), Image.Resampling.BOX)
    text = Text(no_wrap=True)
    for line in range(lines):
        for x in range(columns):
            upper, lower = (pixels.getpixel((x, 2 * line + half)) for half in (0, 1))
            text.append("▀", Style(color=_rgb(upper), bgcolor=_rgb(lower)))
        text.append("\n" if line + 1 < lines else "")
    return text


def _rgb(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    return "rgb({},{},{})".format(*pixel)
