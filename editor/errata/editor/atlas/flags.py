"""Flags as values: a tuple of layers, painted in order.

Coordinates: x and y are fractions of the flag's width and height, (0, 0) is the upper hoist.
Radii and thicknesses are fractions of the height, so that a disc is round at any size. Angles are
degrees, clockwise.

Knows nothing about countries (see `world`), and reads no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import acos, atan2, cos, hypot, pi, radians, sin, sqrt
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]

# Edges are drawn this many times larger and averaged down.
SUPERSAMPLING: Final = 4
# The hoist-ward shift that tells a Nordic cross from a centred one.
NORDIC_LIMIT: Final = 0.45

WHITE: Final[Colour] = (255, 255, 255)
BLACK: Final[Colour] = (0, 0, 0)
RED: Final[Colour] = (206, 17, 38)
SCARLET: Final[Colour] = (230, 30, 30)
CRIMSON: Final[Colour] = (186, 12, 47)
CARMINE: Final[Colour] = (158, 27, 52)
MAROON: Final[Colour] = (138, 21, 56)
ORANGE: Final[Colour] = (255, 130, 0)
SAFFRON: Final[Colour] = (255, 153, 51)
YELLOW: Final[Colour] = (252, 209, 22)
GOLD: Final[Colour] = (254, 203, 0)
LEMON: Final[Colour] = (255, 237, 0)
GREEN: Final[Colour] = (0, 122, 61)
DARK_GREEN: Final[Colour] = (0, 98, 51)
BOTTLE_GREEN: Final[Colour] = (0, 64, 26)
BRIGHT_GREEN: Final[Colour] = (0, 158, 73)
LEAF_GREEN: Final[Colour] = (67, 176, 42)
TURQUOISE: Final[Colour] = (0, 119, 139)
SKY: Final[Colour] = (116, 172, 223)
AZURE: Final[Colour] = (0, 161, 222)
BLUE: Final[Colour] = (0, 71, 171)
ROYAL_BLUE: Final[Colour] = (0, 47, 167)
NAVY: Final[Colour] = (1, 33, 105)
BROWN: Final[Colour] = (120, 72, 32)

# The words for a colour, each with the shades that a person would call so.
COLOUR_FAMILIES: Final[dict[str, tuple[Colour, ...]]] = {
    "white": (WHITE,),
    "black": (BLACK,),
    "red": (RED, SCARLET, CRIMSON),
    "maroon": (CARMINE, MAROON),
    "orange": (ORANGE, SAFFRON),
    "yellow": (YELLOW, GOLD, LEMON),
    "green": (GREEN, DARK_GREEN, BOTTLE_GREEN, BRIGHT_GREEN, LEAF_GREEN),
    "light blue": (TURQUOISE, SKY, AZURE),
    "blue": (BLUE, ROYAL_BLUE, NAVY),
    "brown": (BROWN,),
}
COLOURS: Final = tuple(COLOUR_FAMILIES)

LAYOUTS: Final = (
    "plain", "horizontal2", "horizontal3", "horizontal4", "horizontal5", "stripes", "vertical2",
    "vertical3", "nordic cross", "cross", "saltire", "diagonal", "quarters", "rays", "pall", "border",
)  # fmt: skip
EMBLEMS: Final = (
    "none", "canton", "triangle", "crescent", "stars", "star", "sun", "plus", "disc", "bar", "shape",
)  # fmt: skip


class Canvas:
    """An image under construction; turns the flag's coordinates into pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.image = Image.new("RGB", (width, height))
        self._pen = ImageDraw.Draw(self.image)

    def point(self, x: float, y: float) -> Point:
        return x * self.width, y * self.height

    def polygon(self, colour: Colour, points: Sequence[Point]) -> None:
        """Fills the polygon whose corners are given in the flag's coordinates."""
        self._pen.polygon([self.point(x, y) for x, y in points], fill=colour)

    def box(self, colour: Colour, x: float, y: float, width: float, height: float) -> None:
        (left, top), (right, bottom) = self.point(x, y), self.point(x + width, y + height)
        # PIL paints the last row and column too.
        if round(right) > round(left) and round(bottom) > round(top):
            corners = (round(left), round(top), round(right) - 1, round(bottom) - 1)
            self._pen.rectangle(corners, fill=colour)

    def outline(self, colour: Colour, centre: Point, radius_points: Sequence[Point]) -> None:
        """Fills the polygon whose corners are given around `centre` in fractions of the height."""
        x, y = self.point(*centre)
        corners = [(x + dx * self.height, y + dy * self.height) for dx, dy in radius_points]
        self._pen.polygon(corners, fill=colour)

    def disc(self, colour: Colour, centre: Point, radius: float) -> None:
        (x, y), r = self.point(*centre), radius * self.height
        self._pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def stroke(self, colour: Colour, start: Point, end: Point, thickness: float) -> None:
        """Fills a straight band from `start` to `end`, square at its ends."""
        (x0, y0), (x1, y1) = self.point(*start), self.point(*end)
        half = thickness * self.height / 2 / hypot(x1 - x0, y1 - y0)
        dx, dy = (y0 - y1) * half, (x1 - x0) * half
        corners = [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)]
        self._pen.polygon(corners, fill=colour)

    def paste(self, picture: "Canvas", x: float, y: float) -> None:
        left, top = self.point(x, y)
        self.image.paste(picture.image, (round(left), round(top)))


# --- fields -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bands:
    """Parallel bands over the whole flag, from the top or from the hoist; one band is a plain field.

    `weights` are their relative widths; empty means equal.
    """

    colours: tuple[Colour, ...]
    weights: tuple[float, ...] = ()
    vertical: bool = False

    def paint(self, canvas: Canvas) -> None:
        weights = self.weights or (1.0,) * len(self.colours)
        edges = [sum(weights[:i]) / sum(weights) for i in range(len(weights) + 1)]
        for colour, (start, end) in zip(self.colours, pairwise(edges), strict=True):
            if self.vertical:
                canvas.box(colour, start, 0, end - start, 1)
            else:
                canvas.box(colour, 0, start, 1, end - start)


def plain(colour: Colour) -> Bands:
    """A field of one colour."""
    return Bands((colour,))


def horizontal(*colours: Colour, weights: tuple[float, ...] = ()) -> Bands:
    """Bands from the top down."""
    return Bands(colours, weights)


def vertical(*colours: Colour, weights: tuple[float, ...] = ()) -> Bands:
    """Bands from the hoist to the fly."""
    return Bands(colours, weights, vertical=True)


@dataclass(frozen=True, slots=True)
class Quarters:
    """Four rectangles: upper hoist, upper fly, lower hoist, lower fly."""

    colours: tuple[Colour, Colour, Colour, Colour]

    def paint(self, canvas: Canvas) -> None:
        for i, colour in enumerate(self.colours):
            canvas.box(colour, 0.5 * (i % 2), 0.5 * (i // 2), 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Rays:
    """Rays that fan out of the lower hoist, clockwise from the hoist's edge."""

    colours: tuple[Colour, ...]

    def paint(self, canvas: Canvas) -> None:
        count = len(self.colours)
        for i, colour in enumerate(self.colours):
            start, end = 2 * i / count, 2 * (i + 1) / count
            corner = [(1.0, 0.0)] if start < 1 < end else []
            canvas.polygon(colour, [(0, 1), self._rim(start), *corner, self._rim(end)])

    @staticmethod
    def _rim(way: float) -> Point:
        """The point `way` along the upper edge (0 to 1) and then down the fly (1 to 2)."""
        return (way, 0) if way <= 1 else (1, way - 1)


@dataclass(frozen=True, slots=True)
class Corner:
    """One half of a flag that a diagonal divides."""

    colour: Colour
    at: Literal["upper hoist", "upper fly", "lower hoist", "lower fly"]

    def paint(self, canvas: Canvas) -> None:
        corners: dict[str, Point] = {
            "upper hoist": (0, 0),
            "upper fly": (1, 0),
            "lower fly": (1, 1),
            "lower hoist": (0, 1),
        }
        x, y = corners[self.at]
        canvas.polygon(self.colour, [(x, y), (1 - x, y), (x, 1 - y)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Cross:
    """A cross from edge to edge; `x` left of the middle makes it a Nordic one."""

    colour: Colour
    thickness: float
    x: float = 0.5
    fimbriation: Colour | None = None
    fimbriation_thickness: float = 0.0

    def paint(self, canvas: Canvas) -> None:
        if self.fimbriation is not None:
            both = self.thickness + 2 * self.fimbriation_thickness
            self._paint(canvas, self.fimbriation, both)
        self._paint(canvas, self.colour, self.thickness)

    def _paint(self, canvas: Canvas, colour: Colour, thickness: float) -> None:
        across = thickness * canvas.height / canvas.width
        canvas.box(colour, 0, 0.5 - thickness / 2, 1, thickness)
        canvas.box(colour, self.x - across / 2, 0, across, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saltire:
    """A diagonal cross; `sides` colours the triangles at hoist and fly."""

    colour: Colour
    thickness: float
    sides: Colour | None = None

    def paint(self, canvas: Canvas) -> None:
        if self.sides is not None:
            canvas.polygon(self.sides, [(0, 0), (0.5, 0.5), (0, 1)])
            canvas.polygon(self.sides, [(1, 0), (0.5, 0.5), (1, 1)])
        # Lines run past the corners, so that their square ends are not seen.
        canvas.stroke(self.colour, (-0.2, -0.2), (1.2, 1.2), self.thickness)
        canvas.stroke(self.colour, (-0.2, 1.2), (1.2, -0.2), self.thickness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagonal:
    """A band from corner to corner; rising means from the lower hoist to the upper fly."""

    colour: Colour
    thickness: float
    rising: bool = True
    fimbriation: Colour | None = None
    fimbriation_thickness: float = 0.0

    def paint(self, canvas: Canvas) -> None:
        start, end = ((-0.2, 1.2), (1.2, -0.2)) if self.rising else ((-0.2, -0.2), (1.2, 1.2))
        if self.fimbriation is not None:
            both = self.thickness + 2 * self.fimbriation_thickness
            canvas.stroke(self.fimbriation, start, end, both)
        canvas.stroke(self.colour, start, end, self.thickness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pall:
    """A Y on its side: two arms from the hoist's corners meet at `x` and run on to the fly."""

    colour: Colour
    thickness: float
    x: float = 0.5

    def paint(self, canvas: Canvas) -> None:
        for y in (0.0, 1.0):
            before = (-0.2 * self.x, y + 0.2 * (y - 0.5))
            canvas.stroke(self.colour, before, (self.x, 0.5), self.thickness)
        canvas.stroke(self.colour, (self.x, 0.5), (1.1, 0.5), self.thickness)
        # The square ends of the arms leave a notch at the meeting point.
        canvas.disc(self.colour, (self.x, 0.5), self.thickness / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """A frame along the four edges."""

    colour: Colour
    thickness: float

    def paint(self, canvas: Canvas) -> None:
        across = self.thickness * canvas.height / canvas.width
        canvas.box(self.colour, 0, 0, 1, self.thickness)
        canvas.box(self.colour, 0, 1 - self.thickness, 1, self.thickness)
        canvas.box(self.colour, 0, 0, across, 1)
        canvas.box(self.colour, 1 - across, 0, across, 1)


# --- emblems ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Canton:
    """A flag within the flag, at the upper hoist unless said otherwise."""

    flag: "Flag"
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0

    def paint(self, canvas: Canvas) -> None:
        width, height = self.width * canvas.width, self.height * canvas.height
        canvas.paste(_painted(self.flag, round(width), round(height)), self.x, self.y)


@dataclass(frozen=True, slots=True)
class Triangle:
    """A triangle with its base on the hoist, `depth` of the flag's width deep."""

    colour: Colour
    depth: float
    base: float = 1.0

    def paint(self, canvas: Canvas) -> None:
        top, bottom = 0.5 - self.base / 2, 0.5 + self.base / 2
        canvas.polygon(self.colour, [(0, top), (self.depth, 0.5), (0, bottom)])


@dataclass(frozen=True, slots=True)
class Disc:
    """A filled circle."""

    colour: Colour
    radius: float
    x: float = 0.5
    y: float = 0.5

    def paint(self, canvas: Canvas) -> None:
        canvas.disc(self.colour, (self.x, self.y), self.radius)


@dataclass(frozen=True, slots=True)
class Star:
    """A star with one ray up, turned by `rotation`; `inner` is its notches' share of the radius."""

    colour: Colour
    radius: float
    x: float = 0.5
    y: float = 0.5
    points: int = 5
    rotation: float = 0.0
    inner: float = 0.382  # of a pentagram

    def paint(self, canvas: Canvas) -> None:
        rim = _star(self.radius, self.points, self.rotation, self.inner)
        canvas.outline(self.colour, (self.x, self.y), rim)


@dataclass(frozen=True, slots=True)
class Sun:
    """A disc with pointed rays; `core` is the disc's share of the radius."""

    colour: Colour
    radius: float
    x: float = 0.5
    y: float = 0.5
    rays: int = 16
    core: float = 0.6
    rotation: float = 0.0

    def paint(self, canvas: Canvas) -> None:
        rim = _star(self.radius, self.rays, self.rotation, self.core * 0.9)
        canvas.outline(self.colour, (self.x, self.y), rim)
        canvas.disc(self.colour, (self.x, self.y), self.radius * self.core)


@dataclass(frozen=True, slots=True)
class Crescent:
    """A disc less a smaller one; it opens to the fly, turned by `rotation`.

    `bite` is the smaller disc's radius and `shift` its displacement, both shares of the radius.
    """

    colour: Colour
    radius: float
    x: float = 0.5
    y: float = 0.5
    rotation: float = 0.0
    bite: float = 0.8
    shift: float = 0.3

    def __post_init__(self) -> None:
        if not abs(1 - self.bite) < self.shift < 1 + self.bite:
            message = f"a bite of {self.bite} shifted by {self.shift} does not cut the disc's rim"
            raise ValueError(f"{message}; the shift must exceed {abs(1 - self.bite):.2f}")

    def paint(self, canvas: Canvas) -> None:
        # The two rims meet at angle ±outer around the disc and ±notch around the bite.
        outer = acos((self.shift**2 + 1 - self.bite**2) / (2 * self.shift))
        notch = atan2(sin(outer), cos(outer) - self.shift)
        rim = [(cos(a), sin(a)) for a in np.linspace(outer, 2 * pi - outer, 60)]
        hollow = np.linspace(2 * pi - notch, notch, 60)
        rim += [(self.shift + self.bite * cos(a), self.bite * sin(a)) for a in hollow]
        turned = _turned([(x * self.radius, y * self.radius) for x, y in rim], self.rotation)
        canvas.outline(self.colour, (self.x, self.y), turned)


@dataclass(frozen=True, slots=True)
class Plus:
    """A cross that does not reach the edges; `radius` is the length of an arm."""

    colour: Colour
    radius: float
    thickness: float
    x: float = 0.5
    y: float = 0.5

    def paint(self, canvas: Canvas) -> None:
        across = canvas.height / canvas.width
        long, short = 2 * self.radius, self.thickness
        for width, height in ((long * across, short), (short * across, long)):
            canvas.box(self.colour, self.x - width / 2, self.y - height / 2, width, height)


@dataclass(frozen=True, slots=True)
class Bar:
    """An upright band over the whole height, from `x` on (0 is the hoist)."""

    colour: Colour
    width: float
    x: float = 0.0

    def paint(self, canvas: Canvas) -> None:
        canvas.box(self.colour, self.x, 0, self.width, 1)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A filled rectangle; `x` and `y` are its upper hoist corner."""

    colour: Colour
    x: float
    y: float
    width: float
    height: float

    def paint(self, canvas: Canvas) -> None:
        canvas.box(self.colour, self.x, self.y, self.width, self.height)


@dataclass(frozen=True, slots=True)
class Polygon:
    """A filled polygon with corners anywhere, outside the flag too."""

    colour: Colour
    points: tuple[Point, ...]

    def paint(self, canvas: Canvas) -> None:
        canvas.polygon(self.colour, self.points)


Field: TypeAlias = Bands | Quarters | Rays
Emblem: TypeAlias = Canton | Triangle | Disc | Star | Sun | Crescent | Plus | Bar | Rectangle | Polygon
Layer: TypeAlias = Field | Corner | Cross | Saltire | Diagonal | Pall | Border | Emblem
Flag: TypeAlias = tuple[Layer, ...]


def draw(flag: Flag, *, width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """Returns the flag as uint8 [height, width, 3], antialiased. The same flag, the same bytes."""
    large = _painted(flag, width * SUPERSAMPLING, height * SUPERSAMPLING)
    return np.array(large.image.reduce(SUPERSAMPLING), dtype=np.uint8)


def _painted(flag: Flag, width: int, height: int) -> Canvas:
    canvas = Canvas(width, height)
    for layer in flag:
        layer.paint(canvas)
    return canvas


def _star(radius: float, points: int, rotation: float, inner: float) -> list[Point]:
    steps = [(radius * (inner if i % 2 else 1.0), pi * i / points) for i in range(2 * points)]
    return _turned([(r * sin(a), -r * cos(a)) for r, a in steps], rotation)


def _turned(points: Sequence[Point], degrees: float) -> list[Point]:
    c, s = cos(radians(degrees)), sin(radians(degrees))
    return [(c * x - s * y, s * x + c * y) for x, y in points]


# --- what a flag shows --------------------------------------------------------------------------


def layout_of(flag: Flag) -> str:
    """Returns which of LAYOUTS the field shows: a cross or a diagonal counts before its ground."""
    for layer in flag[1:]:
        match layer:
            case Cross():
                return "nordic cross" if layer.x < NORDIC_LIMIT else "cross"
            case Corner() | Diagonal():
                return "diagonal"
            case Saltire():
                return "saltire"
            case Pall():
                return "pall"
            case Border():
                return "border"
    match flag[0]:
        case Bands() as bands:
            return _bands_layout(bands)
        case Quarters():
            return "quarters"
        case Rays():
            return "rays"
        case other:
            name = type(other).__name__
            raise ValueError(f"the first layer is a {name}; start with Bands, Quarters or Rays")


def _bands_layout(bands: Bands) -> str:
    count = len(bands.colours)
    if count == 1:
        return "plain"
    name = f"{'vertical' if bands.vertical else 'horizontal'}{count}"
    return name if name in LAYOUTS else "stripes"


def emblem_of(flag: Flag) -> str:
    """Returns the flag's main emblem: the first of EMBLEMS, in their order, that it carries."""
    shown = [_emblem_name(layer) for layer in flag]
    if shown.count("star") > 1:
        shown.append("stars")
    return next((emblem for emblem in EMBLEMS[1:] if emblem in shown), "none")


def _emblem_name(layer: Layer) -> str:
    match layer:
        case Canton() | Triangle() | Crescent() | Star() | Sun() | Plus() | Disc() | Bar():
            return type(layer).__name__.lower()
        case Rectangle() | Polygon():
            return "shape"
        case _:
            return "none"


def layout_label(flag: Flag) -> int:
    """Returns the index of `layout_of(flag)` in LAYOUTS."""
    return LAYOUTS.index(layout_of(flag))


def emblem_label(flag: Flag) -> int:
    """Returns the index of `emblem_of(flag)` in EMBLEMS."""
    return EMBLEMS.index(emblem_of(flag))


def colour_name(colour: Colour) -> str:
    """Returns which of COLOURS a shade belongs to: that of the nearest named shade."""

    def distance(shade: Colour) -> float:
        # "Redmean": nearer to the eye than plain RGB distance (compuphase.com/cmetric.htm).
        mean = (colour[0] + shade[0]) / 2
        red, green, blue = (a - b for a, b in zip(colour, shade, strict=True))
        weights = (2 + mean / 256, 4.0, 2 + (255 - mean) / 256)
        return sqrt(weights[0] * red**2 + weights[1] * green**2 + weights[2] * blue**2)

    return min(COLOURS, key=lambda name: min(distance(shade) for shade in COLOUR_FAMILIES[name]))


# --- flags of no country ------------------------------------------------------------------------


def random_flag(rng: np.random.Generator) -> Flag:
    """Returns a made-up flag; layout and emblem are drawn evenly from LAYOUTS and EMBLEMS."""
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    emblem = EMBLEMS[rng.integers(len(EMBLEMS))]
    inks = _Inks(rng)
    return (*_random_field(layout, inks, rng), *_RANDOM_EMBLEMS[emblem](inks, rng))


class _Inks:
    """Deals colours of different families, so that neighbours in a flag contrast."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: list[str] = []

    def next(self) -> Colour:
        if not self._left:
            self._left = [str(name) for name in self._rng.permutation(COLOURS)]
        shades = COLOUR_FAMILIES[self._left.pop()]
        return shades[self._rng.integers(len(shades))]

    def take(self, count: int) -> tuple[Colour, ...]:
        return tuple(self.next() for _ in range(count))


def _random_field(layout: str, inks: _Inks, rng: np.random.Generator) -> Flag:
    thickness = float(rng.uniform(0.12, 0.3))
    edge = (inks.next() if rng.random() < 0.5 else None, float(rng.uniform(0.03, 0.07)))
    match layout:
        case "nordic cross" | "cross":
            x = float(rng.uniform(0.33, 0.4)) if layout == "nordic cross" else 0.5
            cross = Cross(
                colour=inks.next(),
                thickness=thickness,
                x=x,
                fimbriation=edge[0],
                fimbriation_thickness=edge[1],
            )
            return (_random_ground(inks, rng), cross)
        case "saltire":
            sides = inks.next() if rng.random() < 0.5 else None
            saltire = Saltire(colour=inks.next(), thickness=thickness, sides=sides)
            return (plain(inks.next()), saltire)
        case "diagonal":
            return _random_diagonal(inks, rng, thickness, edge)
        case "pall":
            ground = horizontal(*inks.take(2))
            x = float(rng.uniform(0.38, 0.5))
            wide = Pall(colour=inks.next(), thickness=thickness + 0.1, x=x)
            return (ground, wide, Pall(colour=inks.next(), thickness=thickness * 0.7, x=x))
        case "border":
            border = Border(colour=inks.next(), thickness=thickness * 0.6)
            return (_random_bands(str(rng.choice(LAYOUTS[:3])), inks, rng), border)
        case "quarters":
            a, b, c, d = inks.take(4)
            return (Quarters((a, b, c, d) if rng.random() < 0.5 else (a, b, b, a)),)
        case "rays":
            return (Rays(inks.take(int(rng.integers(3, 7)))),)
        case _:
            return (_random_bands(layout, inks, rng),)


def _random_ground(inks: _Inks, rng: np.random.Generator) -> Field:
    if rng.random() < 0.7:
        return plain(inks.next())
    a, b = inks.take(2)
    return Quarters((a, b, b, a))


def _random_diagonal(
    inks: _Inks, rng: np.random.Generator, thickness: float, edge: tuple[Colour | None, float]
) -> Flag:
    rising = bool(rng.random() < 0.5)
    corner = Corner(inks.next(), "upper hoist" if rising else "upper fly")
    band = Diagonal(
        colour=inks.next(),
        thickness=thickness,
        rising=rising,
        fimbriation=edge[0],
        fimbriation_thickness=edge[1],
    )
    layers: tuple[Layer, ...] = ((corner, band), (corner,), (band,))[rng.integers(3)]
    return (plain(inks.next()), *layers)


def _random_bands(layout: str, inks: _Inks, rng: np.random.Generator) -> Bands:
    if layout == "stripes":
        pair = inks.take(2)
        return Bands(tuple(pair[i % 2] for i in range(int(rng.integers(7, 15)))))
    count = 1 if layout == "plain" else int(layout[-1])
    colours = inks.take(count)
    if count >= 3 and rng.random() < 0.4:
        colours = tuple(colours[min(i, count - 1 - i)] for i in range(count))
    weights: tuple[float, ...] = ()
    if rng.random() < 0.5:
        half = rng.choice([1.0, 1.5, 2.0, 3.0], size=count)
        weights = tuple(float(half[min(i, count - 1 - i)]) for i in range(count))
        if count == 3 and rng.random() < 0.3:
            weights = (2.0, 1.0, 1.0)
    return Bands(colours, weights, vertical=layout.startswith("vertical"))


def _place(rng: np.random.Generator) -> Point:
    """The places where emblems stand: the middle, hoist-ward, the corners; a little off."""
    spots = ((0.5, 0.5), (0.5, 0.5), (0.3, 0.5), (0.7, 0.5), (0.2, 0.25), (0.8, 0.25), (0.2, 0.75))
    x, y = spots[rng.integers(len(spots))]
    return x + float(rng.uniform(-0.03, 0.03)), y + float(rng.uniform(-0.03, 0.03))


def _random_canton(inks: _Inks, rng: np.random.Generator) -> Flag:
    inside = ("none", "star", "stars", "sun", "plus", "crescent")[rng.integers(6)]
    layout = ("plain", "plain", "cross", "saltire")[rng.integers(4)]
    field = _random_field(layout, inks, rng)
    charge = _RANDOM_EMBLEMS[inside](inks, rng) if layout == "plain" else ()
    width, height = float(rng.uniform(0.33, 0.5)), float(rng.uniform(0.4, 0.6))
    return (Canton((*field, *charge), width, height),)


def _random_triangle(inks: _Inks, rng: np.random.Generator) -> Flag:
    depth = float(rng.uniform(0.28, 0.7))
    triangle = Triangle(inks.next(), depth)
    match rng.integers(3):
        case 0:
            return (triangle, Triangle(inks.next(), depth * 0.75, 0.75))
        case 1:
            radius = float(rng.uniform(0.08, 0.14))
            return (triangle, Star(inks.next(), radius, depth / 3, points=int(rng.integers(5, 9))))
        case _:
            return (triangle,)


def _random_crescent(inks: _Inks, rng: np.random.Generator) -> Flag:
    x, y = _place(rng)
    radius, rotation = float(rng.uniform(0.15, 0.28)), float(rng.choice([0, 0, -45, -90, 180]))
    colour = inks.next()
    crescent = Crescent(colour, radius, x, y, rotation)
    if rng.random() < 0.4:
        return (crescent,)
    # The star stands in the opening; x counts widths, the radius heights (3:2).
    dx, dy = _turned([(0.7 * radius, 0.0)], rotation)[0]
    star = Star(colour, radius * 0.5, x + dx / 1.5, y + dy, rotation=-90)
    return (crescent, star)


def _random_star(inks: _Inks, rng: np.random.Generator) -> Flag:
    x, y = _place(rng)
    points, rotation = int(rng.choice([5, 5, 5, 6, 7, 8])), float(rng.choice([0, 0, 0, 36, 20]))
    star = Star(inks.next(), float(rng.uniform(0.14, 0.32)), x, y, points, rotation)
    if rng.random() < 0.3:
        return (Disc(inks.next(), star.radius * 1.3, x, y), star)
    return (star,)


def _random_stars(inks: _Inks, rng: np.random.Generator) -> Flag:
    colour, count = inks.next(), int(rng.integers(2, 10))
    radius = float(rng.uniform(0.05, 0.1))
    match rng.integers(3):
        case 0:  # a row
            return tuple(Star(colour, radius, 0.5 + 0.8 * (i / (count - 1) - 0.5)) for i in range(count))
        case 1:  # a ring
            ring = [2 * pi * i / count for i in range(count)]
            return tuple(Star(colour, radius, 0.5 + 0.2 * sin(a), 0.5 - 0.3 * cos(a)) for a in ring)
        case _:  # scattered
            return tuple(
                Star(colour, radius, float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.1, 0.9))) for _ in range(count)
            )


def _random_sun(inks: _Inks, rng: np.random.Generator) -> Flag:
    x, y = _place(rng)
    radius, core = float(rng.uniform(0.14, 0.3)), float(rng.uniform(0.45, 0.75))
    return (Sun(inks.next(), radius, x, y, int(rng.integers(8, 33)), core),)


def _random_plus(inks: _Inks, rng: np.random.Generator) -> Flag:
    x, y = _place(rng)
    radius = float(rng.uniform(0.12, 0.3))
    return (Plus(inks.next(), radius, radius * float(rng.uniform(0.35, 0.75)), x, y),)


def _random_disc(inks: _Inks, rng: np.random.Generator) -> Flag:
    x, y = _place(rng)
    radius = float(rng.uniform(0.12, 0.33))
    disc = Disc(inks.next(), radius, x, y)
    return (disc, Disc(inks.next(), radius * 0.7, x, y)) if rng.random() < 0.3 else (disc,)


def _random_bar(inks: _Inks, rng: np.random.Generator) -> Flag:
    width = float(rng.uniform(0.15, 0.42))
    return (Bar(inks.next(), width, (0.0, 0.0, 0.5 - width / 2, 1 - width)[rng.integers(4)]),)


def _random_shape(inks: _Inks, rng: np.random.Generator) -> Flag:
    x, y = _place(rng)
    half_width, half_height = (float(v) for v in rng.uniform(0.08, 0.3, size=2))
    left, right, top, bottom = x - half_width, x + half_width, y - half_height, y + half_height
    match rng.integers(3):
        case 0:
            return (Rectangle(inks.next(), left, top, 2 * half_width, 2 * half_height),)
        case 1:
            return (Polygon(inks.next(), ((left, y), (x, top), (right, y), (x, bottom))),)
        case _:
            return (Polygon(inks.next(), ((left, bottom), (x, top), (right, bottom))),)


_RANDOM_EMBLEMS: Final[dict[str, Callable[[_Inks, np.random.Generator], Flag]]] = {
    "none": lambda _inks, _rng: (),
    "canton": _random_canton,
    "triangle": _random_triangle,
    "crescent": _random_crescent,
    "stars": _random_stars,
    "star": _random_star,
    "sun": _random_sun,
    "plus": _random_plus,
    "disc": _random_disc,
    "bar": _random_bar,
    "shape": _random_shape,
}
