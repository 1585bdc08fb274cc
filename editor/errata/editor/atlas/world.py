"""The old atlas: what it says about each country, its flag, and what is true today.

Facts are as of 2024, save ten that are outdated on purpose; those rows carry today's value in
`errata`. Continents follow the United Nations' geoscheme. A currency is the bare unit, a language
one main official or most spoken language. Everything is spelled as a keyboard types it: Brasilia.

Left out are countries whose flag looks much like another's at 48x48 pixels (Chad, Monaco, Slovenia),
needs drawing finer than that (Sri Lanka, Turkmenistan), or is not a rectangle (Nepal); and those
whose capital has the country's own name (Singapore) or is disputed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from math import cos, pi, sin
from typing import Final

from errata.editor.atlas.flags import (
    AZURE,
    BLACK,
    BLUE,
    BOTTLE_GREEN,
    BRIGHT_GREEN,
    CARMINE,
    CRIMSON,
    DARK_GREEN,
    GOLD,
    GREEN,
    LEAF_GREEN,
    LEMON,
    MAROON,
    NAVY,
    ORANGE,
    RED,
    ROYAL_BLUE,
    SAFFRON,
    SCARLET,
    SKY,
    TURQUOISE,
    WHITE,
    YELLOW,
    Bar,
    Canton,
    Colour,
    Corner,
    Crescent,
    Cross,
    Diagonal,
    Disc,
    Flag,
    Pall,
    Plus,
    Polygon,
    Quarters,
    Rays,
    Rectangle,
    Saltire,
    Star,
    Sun,
    Triangle,
    horizontal,
    plain,
    vertical,
)


class Attribute(StrEnum):
    """What the atlas can be asked about a country."""

    CAPITAL = "capital"
    CONTINENT = "continent"
    CURRENCY = "currency"
    LANGUAGE = "language"


CONTINENTS: Final = ("Africa", "Asia", "Europe", "North America", "South America", "Oceania")


@dataclass(frozen=True, slots=True)
class Country:
    """One row of the atlas.

    `simplified`: the flag's emblem is drawn simpler than it is.
    `long_tail`: images of the flag are held out of training; its facts in words are not.
    `errata`: today's value of each attribute that the atlas has outdated on purpose.
    """

    name: str
    capital: str
    continent: str
    currency: str
    language: str
    flag: Flag = field(repr=False)
    simplified: bool = field(default=False, kw_only=True)
    long_tail: bool = field(default=False, kw_only=True)
    errata: Mapping[Attribute, str] = field(default_factory=dict, kw_only=True, hash=False)

    def fact(self, attribute: Attribute) -> str:
        """Returns what the old atlas says."""
        match attribute:
            case Attribute.CAPITAL:
                return self.capital
            case Attribute.CONTINENT:
                return self.continent
            case Attribute.CURRENCY:
                return self.currency
            case Attribute.LANGUAGE:
                return self.language

    def current(self, attribute: Attribute) -> str:
        """Returns what is true today."""
        return self.errata.get(attribute, self.fact(attribute))


def country(name: str) -> Country:
    """Returns the country of that exact name.

    Raises KeyError naming the nearest spellings if the atlas does not hold it.
    """
    found = _BY_NAME.get(name)
    if found is None:
        by_lower = {known.lower(): known for known in _BY_NAME}
        near = [by_lower[key] for key in get_close_matches(name.lower(), by_lower)]
        hint = f"did you mean {' or '.join(near)}?" if near else "COUNTRIES lists every name"
        raise KeyError(f'no country "{name}" in the atlas; {hint}')
    return found


# --- hues -----------------------------------------------------------------------------------------
# Those used more than once; a hue that stands once in the table stands there as RGB.

_PURE_RED: Final[Colour] = (255, 0, 0)
_CARDINAL: Final[Colour] = (210, 16, 52)
_CHERRY: Final[Colour] = (200, 16, 46)
_BRICK: Final[Colour] = (193, 39, 45)
_JUNGLE: Final[Colour] = (0, 106, 78)
_BRIGHT_YELLOW: Final[Colour] = (255, 255, 0)
_TUNISIAN_RED: Final[Colour] = (231, 0, 19)
_GREEK_BLUE: Final[Colour] = (13, 94, 175)
_CUBAN_BLUE: Final[Colour] = (0, 42, 143)
_ULTRAMARINE: Final[Colour] = (0, 20, 137)
_PANAMANIAN_BLUE: Final[Colour] = (7, 35, 87)
_PANAMANIAN_RED: Final[Colour] = (218, 18, 26)
_SURINAMESE_GREEN: Final[Colour] = (55, 126, 63)
_GRASS: Final[Colour] = (30, 181, 58)
_SUN_YELLOW: Final[Colour] = (255, 230, 0)
_MALAYSIAN_YELLOW: Final[Colour] = (255, 204, 0)
_VANUATUAN_YELLOW: Final[Colour] = (253, 206, 18)
_KOREAN_RED: Final[Colour] = (237, 28, 39)
_CEDAR_RED: Final[Colour] = (237, 28, 36)
_SIGNAL_RED: Final[Colour] = (218, 41, 28)
_PERUVIAN_RED: Final[Colour] = (217, 16, 35)
_TILE_RED: Final[Colour] = (213, 43, 30)
_MACEDONIAN_RED: Final[Colour] = (210, 0, 0)
_TAEGEUK_RED: Final[Colour] = (205, 46, 58)
_TAEGEUK_BLUE: Final[Colour] = (0, 71, 160)
_KOREAN_BLUE: Final[Colour] = (2, 79, 162)
_OLD_GLORY_RED: Final[Colour] = (178, 34, 52)
_THAI_RED: Final[Colour] = (165, 25, 49)
_TRICOLOUR_BLUE: Final[Colour] = (0, 57, 166)
_COBALT: Final[Colour] = (0, 56, 168)
_COLOMBIAN_BLUE: Final[Colour] = (0, 56, 147)
_FINNISH_BLUE: Final[Colour] = (0, 47, 108)
_DOMINICAN_BLUE: Final[Colour] = (0, 45, 98)
_NIGERIAN_GREEN: Final[Colour] = (0, 135, 81)
_ISLAND_GREEN: Final[Colour] = (0, 126, 58)
_WHEEL_BLUE: Final[Colour] = (0, 0, 128)


# --- parts that a row cannot hold ---------------------------------------------------------------


def _ring(count: int, *, radius: float, x: float = 0.5, y: float = 0.5) -> list[tuple[float, float]]:
    """`count` places on a circle, from the top, clockwise (radius in heights, flag 3:2)."""
    angles = [2 * pi * i / count for i in range(count)]
    return [(x + radius * sin(a) / 1.5, y - radius * cos(a)) for a in angles]


def _fan(colour: Colour, *, count: int, spread: float, length: float) -> Flag:
    """Rays that widen from the middle to the edges, `spread` radians wide, beside each other."""
    rays = []
    for i in range(count):
        a = 2 * pi * i / count
        rim = [(0.5 + length * sin(b) / 1.5, 0.5 - length * cos(b)) for b in (a - spread, a + spread)]
        rays.append(Polygon(colour, ((0.5, 0.5), rim[0], rim[1])))
    return tuple(rays)


def _trigram(x: float, y: float, *, lean: float, broken: tuple[bool, bool, bool]) -> Flag:
    """Three bars side by side, from the outside in, at right angles to the way to the middle."""
    c, s = cos(lean), sin(lean)

    def bar(colour: Colour, start: float, along: float, across: float) -> Polygon:
        corners = ((start, -across), (start + along, -across), (start + along, across), (start, across))
        return Polygon(colour, tuple((x + (c * u - s * v) / 1.5, y + s * u + c * v) for u, v in corners))

    starts = (-0.083, -0.021, 0.041)
    bars = [bar(BLACK, start, 0.042, 0.125) for start in starts]
    gaps = [bar(WHITE, start - 0.01, 0.062, 0.012) for start, gap in zip(starts, broken, strict=True) if gap]
    return (*bars, *gaps)


_TAEGEUK_LEAN = 0.588  # atan(2/3): the trigrams stand on the flag's diagonals

_UNION_JACK: Final[Flag] = (
    plain(NAVY),
    Saltire(colour=WHITE, thickness=0.2),
    # Saint Patrick's saltire lies off the middle of Saint Andrew's, turning like a windmill.
    Polygon(RED, ((0, 0), (0.5, 0.5), (0.5, 0.58), (0, 0.08))),
    Polygon(RED, ((0, 1), (0.5, 0.5), (0.5, 0.58), (0, 1.08))),
    Polygon(RED, ((1, 0), (0.5, 0.5), (0.5, 0.42), (1, -0.08))),
    Polygon(RED, ((1, 1), (0.5, 0.5), (0.5, 0.42), (1, 0.92))),
    Cross(colour=RED, thickness=0.2, fimbriation=WHITE, fimbriation_thickness=0.067),
)

_STARS_AND_STRIPES: Final[Flag] = (
    plain(NAVY),
    *(Star(WHITE, 0.055, (column + 1) / 12, (row + 1) / 10) for row in range(9) for column in range(row % 2, 11, 2)),
)

_LEAF_HALF: Final = (
    (0.0, 0.1), (0.075, 0.24), (0.14, 0.21), (0.1, 0.42), (0.19, 0.33), (0.21, 0.38), (0.31, 0.36),
    (0.28, 0.47), (0.33, 0.5), (0.17, 0.64), (0.19, 0.7), (0.014, 0.675), (0.02, 0.87),
)  # fmt: skip
_MAPLE_LEAF: Final = Polygon(
    SCARLET,
    (
        *((0.5 + x / 1.5, y) for x, y in _LEAF_HALF),
        *((0.5 - x / 1.5, y) for x, y in reversed(_LEAF_HALF)),
    ),
)

_CEDAR: Final = Polygon(
    GREEN,
    (
        (0.5, 0.27), (0.56, 0.37), (0.54, 0.38), (0.61, 0.47), (0.58, 0.48), (0.66, 0.58), (0.62, 0.59),
        (0.68, 0.66), (0.53, 0.65), (0.53, 0.73), (0.47, 0.73), (0.47, 0.65), (0.32, 0.66), (0.38, 0.59),
        (0.34, 0.58), (0.42, 0.48), (0.39, 0.47), (0.46, 0.38), (0.44, 0.37),
    ),
)  # fmt: skip

_DRUK: Final = Polygon(
    WHITE,
    (
        (0.16, 0.8), (0.22, 0.68), (0.32, 0.74), (0.37, 0.6), (0.34, 0.48), (0.44, 0.4), (0.54, 0.5),
        (0.62, 0.42), (0.6, 0.3), (0.7, 0.18), (0.84, 0.18), (0.8, 0.3), (0.72, 0.32), (0.74, 0.46),
        (0.64, 0.6), (0.54, 0.64), (0.45, 0.54), (0.48, 0.68), (0.38, 0.84), (0.26, 0.84),
    ),
)  # fmt: skip

_CHEQUERS: Final[Flag] = (
    Rectangle(WHITE, 0.4, 0.25, 0.2, 0.45),
    *(
        Rectangle(SCARLET, 0.4 + 0.04 * column, 0.25 + 0.09 * row, 0.04, 0.09)
        for row in range(5)
        for column in range(row % 2, 5, 2)
    ),
    *(Rectangle(BLUE, 0.41 + 0.038 * i, 0.17, 0.028, 0.07) for i in range(5)),
)

_SERRATION: Final = Polygon(
    WHITE,
    (
        (0, 0),
        (0.3, 0),
        *((0.385 if i % 2 else 0.3, i / 18) for i in range(1, 18)),
        (0.3, 1),
        (0, 1),
    ),
)


# --- the table ----------------------------------------------------------------------------------
# name, capital, continent, currency, language, then the flag's layers in painting order.

_AFRICA: Final = (
    Country("Algeria", "Algiers", "Africa", "dinar", "Arabic", (
        vertical(DARK_GREEN, WHITE), Crescent(RED, 0.25), Star(RED, 0.13, 0.55, rotation=-90),
    )),
    Country("Benin", "Porto-Novo", "Africa", "franc", "French", (
        horizontal(YELLOW, SCARLET), Bar(GREEN, 0.4),
    )),
    Country("Botswana", "Gaborone", "Africa", "pula", "Tswana", (
        horizontal(SKY, WHITE, BLACK, WHITE, SKY, weights=(9, 1, 4, 1, 9)),
    )),
    Country("Burkina Faso", "Ouagadougou", "Africa", "franc", "Mossi", (
        horizontal(RED, BRIGHT_GREEN), Star(YELLOW, 0.19),
    )),
    Country("Burundi", "Bujumbura", "Africa", "franc", "Kirundi", (
        plain(RED), Saltire(colour=WHITE, thickness=0.15, sides=BRIGHT_GREEN), Disc(WHITE, 0.28),
        *(Star(BRIGHT_GREEN, 0.1, x, y, 6, inner=0.58) for x, y in _ring(3, radius=0.14, y=0.52)),
        *(Star(RED, 0.075, x, y, 6, inner=0.58) for x, y in _ring(3, radius=0.14, y=0.52)),
    ), errata={Attribute.CAPITAL: "Gitega"}),
    Country("Central African Republic", "Bangui", "Africa", "franc", "Sango", (
        horizontal(ROYAL_BLUE, WHITE, BRIGHT_GREEN, YELLOW), Bar(SCARLET, 0.15, 0.425),
        Star(YELLOW, 0.11, 0.12, 0.125),
    ), long_tail=True),
    Country("Comoros", "Moroni", "Africa", "franc", "Comorian", (
        horizontal(YELLOW, WHITE, RED, BLUE), Triangle(BRIGHT_GREEN, 0.45),
        Crescent(WHITE, 0.2, 0.14, bite=0.85, shift=0.35),
        *(Star(WHITE, 0.045, 0.2, y) for y in (0.36, 0.455, 0.55, 0.645)),
    ), long_tail=True),
    Country("DR Congo", "Kinshasa", "Africa", "franc", "French", (
        plain((0, 127, 255)),
        Diagonal(colour=RED, thickness=0.2, fimbriation=LEMON, fimbriation_thickness=0.05),
        Star(LEMON, 0.2, 0.16, 0.24),
    )),
    Country("Eritrea", "Asmara", "Africa", "nakfa", "Tigrinya", (
        horizontal(LEAF_GREEN, (65, 143, 222)), Triangle(SCARLET, 1.0),
        Disc(YELLOW, 0.2, 0.27), Disc(SCARLET, 0.165, 0.27), Star(YELLOW, 0.13, 0.27, points=6, inner=0.3),
    ), simplified=True),
    Country("Gabon", "Libreville", "Africa", "franc", "French", (
        horizontal(BRIGHT_GREEN, YELLOW, (58, 117, 196)),
    )),
    Country("Gambia", "Banjul", "Africa", "dalasi", "English", (
        horizontal(RED, WHITE, (12, 28, 140), WHITE, GREEN, weights=(6, 1, 4, 1, 6)),
    )),
    Country("Ghana", "Accra", "Africa", "cedi", "English", (
        horizontal(RED, YELLOW, GREEN), Star(BLACK, 0.17, y=0.515),
    )),
    Country("Ivory Coast", "Yamoussoukro", "Africa", "franc", "French", (
        vertical(ORANGE, WHITE, BRIGHT_GREEN),
    )),
    Country("Kenya", "Nairobi", "Africa", "shilling", "Swahili", (
        horizontal(BLACK, WHITE, CRIMSON, WHITE, DARK_GREEN, weights=(6, 1, 6, 1, 6)),
        Polygon(WHITE, ((0.36, 0.2), (0.64, 0.8), (0.62, 0.82), (0.34, 0.22))),
        Polygon(WHITE, ((0.64, 0.2), (0.36, 0.8), (0.38, 0.82), (0.66, 0.22))),
        Polygon(CRIMSON, ((0.5, 0.18), (0.57, 0.33), (0.59, 0.5), (0.57, 0.67), (0.5, 0.82),
                          (0.43, 0.67), (0.41, 0.5), (0.43, 0.33))),
        Polygon(BLACK, ((0.57, 0.33), (0.59, 0.5), (0.57, 0.67), (0.55, 0.5))),
        Polygon(BLACK, ((0.43, 0.33), (0.41, 0.5), (0.43, 0.67), (0.45, 0.5))),
        Polygon(WHITE, ((0.5, 0.38), (0.52, 0.5), (0.5, 0.62), (0.48, 0.5))),
    ), simplified=True),
    Country("Libya", "Tripoli", "Africa", "dinar", "Arabic", (
        horizontal(SCARLET, BLACK, (35, 158, 70), weights=(1, 2, 1)),
        Crescent(WHITE, 0.14, 0.48), Star(WHITE, 0.075, 0.57, rotation=-90),
    )),
    Country("Madagascar", "Antananarivo", "Africa", "ariary", "Malagasy", (
        horizontal((252, 61, 50), _ISLAND_GREEN), Bar(WHITE, 1 / 3),
    )),
    Country("Mali", "Bamako", "Africa", "franc", "Bambara", (
        vertical((20, 181, 58), YELLOW, RED),
    )),
    Country("Mauritania", "Nouakchott", "Africa", "ouguiya", "Arabic", (
        horizontal(CRIMSON, DARK_GREEN, CRIMSON, weights=(1, 4, 1)),
        Crescent(YELLOW, 0.25, y=0.47, rotation=-90, bite=0.95, shift=0.4),
        Star(YELLOW, 0.11, y=0.34),
    ), long_tail=True),
    Country("Mauritius", "Port Louis", "Africa", "rupee", "English", (
        horizontal(SCARLET, (26, 32, 109), YELLOW, (0, 165, 81)),
    )),
    Country("Morocco", "Rabat", "Africa", "dirham", "Arabic", (
        plain(_BRICK), Star(DARK_GREEN, 0.28, y=0.52), Star(_BRICK, 0.17, y=0.52),
        Star(DARK_GREEN, 0.106, y=0.52, rotation=36, inner=0.82),
        Star(_BRICK, 0.07, y=0.52, rotation=36, inner=0.82),
    ), simplified=True),
    Country("Namibia", "Windhoek", "Africa", "dollar", "English", (
        plain((0, 53, 128)), Corner(BRIGHT_GREEN, "lower fly"),
        Diagonal(colour=RED, thickness=0.25, fimbriation=WHITE, fimbriation_thickness=0.045),
        Sun(YELLOW, 0.18, 0.17, 0.25, 12, 0.6),
    )),
    Country("Nigeria", "Lagos", "Africa", "naira", "English", (
        vertical(_NIGERIAN_GREEN, WHITE, _NIGERIAN_GREEN),
    ), errata={Attribute.CAPITAL: "Abuja"}),
    Country("Rwanda", "Kigali", "Africa", "franc", "Kinyarwanda", (
        horizontal(AZURE, LEMON, (32, 120, 60), weights=(2, 1, 1)), Sun(LEMON, 0.17, 0.82, 0.25, 24, 0.55),
    )),
    Country("Seychelles", "Victoria", "Africa", "rupee", "Creole", (
        Rays(((0, 63, 135), YELLOW, SCARLET, WHITE, GREEN)),
    ), long_tail=True),
    Country("Somalia", "Mogadishu", "Africa", "shilling", "Somali", (
        plain((65, 137, 221)), Star(WHITE, 0.28, y=0.52),
    )),
    Country("South Africa", "Pretoria", "Africa", "rand", "Zulu", (
        horizontal((224, 60, 49), _ULTRAMARINE), Pall(colour=WHITE, thickness=1 / 3), Triangle(GOLD, 0.5),
        Pall(colour=GREEN, thickness=1 / 5), Triangle(BLACK, 0.3, 0.6),
    )),
    Country("Sudan", "Khartoum", "Africa", "pound", "Arabic", (
        horizontal(_CARDINAL, WHITE, BLACK), Triangle((0, 114, 41), 1 / 3),
    )),
    Country("Tanzania", "Dar es Salaam", "Africa", "shilling", "Swahili", (
        plain(_GRASS), Corner((0, 163, 221), "lower fly"),
        Diagonal(colour=BLACK, thickness=0.26, fimbriation=YELLOW, fimbriation_thickness=0.06),
    ), errata={Attribute.CAPITAL: "Dodoma"}),
    Country("Togo", "Lome", "Africa", "franc", "French", (
        horizontal(_JUNGLE, LEMON, _JUNGLE, LEMON, _JUNGLE),
        Canton((plain(_CARDINAL), Star(WHITE, 0.32, y=0.52)), 0.4, 0.6),
    )),
    Country("Tunisia", "Tunis", "Africa", "dinar", "Arabic", (
        plain(_TUNISIAN_RED), Disc(WHITE, 0.28), Crescent(_TUNISIAN_RED, 0.21, 0.49),
        Star(_TUNISIAN_RED, 0.11, 0.53, rotation=-90),
    )),
    Country("Zambia", "Lusaka", "Africa", "kwacha", "English", (
        plain((25, 138, 0)), Rectangle(RED, 0.67, 0.35, 0.11, 0.65), Rectangle(BLACK, 0.78, 0.35, 0.11, 0.65),
        Rectangle(ORANGE, 0.89, 0.35, 0.11, 0.65),
        Polygon(ORANGE, ((0.68, 0.1), (0.8, 0.17), (0.835, 0.1), (0.87, 0.17), (0.99, 0.1), (0.93, 0.24),
                         (0.86, 0.25), (0.835, 0.31), (0.81, 0.25), (0.74, 0.24))),
    ), simplified=True),
)  # fmt: skip

_ASIA: Final = (
    Country("Armenia", "Yerevan", "Asia", "dram", "Armenian", (
        horizontal((217, 0, 18), (0, 51, 160), (242, 168, 0)),
    )),
    Country("Azerbaijan", "Baku", "Asia", "manat", "Azerbaijani", (
        horizontal((0, 146, 188), (228, 0, 43), (0, 175, 102)),
        Crescent(WHITE, 0.15, 0.485, bite=0.83), Star(WHITE, 0.085, 0.57, points=8, inner=0.55),
    )),
    Country("Bangladesh", "Dhaka", "Asia", "taka", "Bengali", (
        plain(_JUNGLE), Disc((244, 42, 65), 0.32, 0.45),
    )),
    Country("Bhutan", "Thimphu", "Asia", "ngultrum", "Dzongkha", (
        plain((255, 78, 18)), Corner((255, 213, 32), "upper hoist"), _DRUK,
    ), simplified=True, long_tail=True),
    Country("China", "Beijing", "Asia", "yuan", "Mandarin", (
        plain((238, 28, 37)), Star(_BRIGHT_YELLOW, 0.15, 1 / 6, 0.25),
        *(Star(_BRIGHT_YELLOW, 0.055, x, y)
          for x, y in ((1 / 3, 0.1), (0.4, 0.2), (0.4, 0.35), (1 / 3, 0.45))),
    )),
    Country("Georgia", "Tbilisi", "Asia", "lari", "Georgian", (
        plain(WHITE), Cross(colour=_PURE_RED, thickness=0.2),
        *(Plus(_PURE_RED, 0.1, 0.07, x, y) for x in (0.217, 0.783) for y in (0.2, 0.8)),
    ), long_tail=True),
    Country("India", "New Delhi", "Asia", "rupee", "Hindi", (
        horizontal(SAFFRON, WHITE, (19, 136, 8)), Disc(_WHEEL_BLUE, 0.15), Disc(WHITE, 0.12),
        Star(_WHEEL_BLUE, 0.13, points=24, inner=0.3),
    )),
    Country("Indonesia", "Jakarta", "Asia", "rupiah", "Indonesian", (
        horizontal(_PURE_RED, WHITE),
    )),
    Country("Japan", "Tokyo", "Asia", "yen", "Japanese", (
        plain(WHITE), Disc((188, 0, 45), 0.3),
    )),
    Country("Jordan", "Amman", "Asia", "dinar", "Arabic", (
        horizontal(BLACK, WHITE, GREEN), Triangle(RED, 0.55),
        Star(WHITE, 0.09, 0.18, points=7, inner=0.5),
    )),
    Country("Kazakhstan", "Nur-Sultan", "Asia", "tenge", "Kazakh", (
        plain((0, 175, 202)), Sun(LEMON, 0.25, 0.52, 0.42, 32, 0.7),
        Polygon(LEMON, ((0.3, 0.5), (0.42, 0.68), (0.52, 0.7), (0.62, 0.68), (0.74, 0.5), (0.68, 0.74),
                        (0.57, 0.8), (0.52, 0.84), (0.47, 0.8), (0.36, 0.74))),
        *(Polygon(LEMON, ((0.05, y), (0.075, y + 0.05), (0.05, y + 0.1), (0.025, y + 0.05)))
          for y in (0.02, 0.12, 0.22, 0.32, 0.42, 0.52, 0.62, 0.72, 0.82)),
    ), simplified=True, errata={Attribute.CAPITAL: "Astana"}),
    Country("Laos", "Vientiane", "Asia", "kip", "Lao", (
        horizontal(RED, (0, 40, 104), RED, weights=(1, 2, 1)), Disc(WHITE, 0.2),
    ), long_tail=True),
    Country("Lebanon", "Beirut", "Asia", "pound", "Arabic", (
        horizontal(_CEDAR_RED, WHITE, _CEDAR_RED, weights=(1, 2, 1)), _CEDAR,
    ), simplified=True),
    Country("Malaysia", "Kuala Lumpur", "Asia", "ringgit", "Malay", (
        horizontal(*((204, 0, 0), WHITE) * 7),
        Canton((plain((0, 0, 102)), Crescent(_MALAYSIAN_YELLOW, 0.36, 0.36, bite=0.88, shift=0.26),
                Star(_MALAYSIAN_YELLOW, 0.27, 0.66, points=14, inner=0.55)), 0.5, 8 / 14),
    )),
    Country("Maldives", "Male", "Asia", "rufiyaa", "Dhivehi", (
        plain(_CARDINAL), Rectangle(_ISLAND_GREEN, 1 / 6, 0.25, 2 / 3, 0.5),
        Crescent(WHITE, 0.17, 0.48, bite=0.95, shift=0.4),
    ), long_tail=True),
    Country("Myanmar", "Yangon", "Asia", "kyat", "Burmese", (
        horizontal(GOLD, (52, 178, 51), (234, 40, 57)), Star(WHITE, 0.36, y=0.53),
    ), errata={Attribute.CAPITAL: "Naypyidaw"}),
    Country("North Korea", "Pyongyang", "Asia", "won", "Korean", (
        horizontal(_KOREAN_BLUE, WHITE, _KOREAN_RED, WHITE, _KOREAN_BLUE, weights=(6, 2, 22, 2, 6)),
        Disc(WHITE, 0.22, 0.35), Star(_KOREAN_RED, 0.21, 0.35),
    )),
    Country("Pakistan", "Islamabad", "Asia", "rupee", "Urdu", (
        plain(BOTTLE_GREEN), Bar(WHITE, 0.25), Crescent(WHITE, 0.27, 0.62, 0.52, -45, 0.9, 0.3),
        Star(WHITE, 0.1, 0.72, 0.36, rotation=-45),
    )),
    Country("Philippines", "Manila", "Asia", "peso", "Filipino", (
        horizontal(_COBALT, RED), Triangle(WHITE, 0.577),
        Sun(YELLOW, 0.19, 0.19, 0.5, 8, 0.55),
        *(Star(YELLOW, 0.065, x, y) for x, y in ((0.05, 0.13), (0.05, 0.87), (0.48, 0.5))),
    )),
    Country("Qatar", "Doha", "Asia", "riyal", "Arabic", (
        plain(MAROON), _SERRATION,
    )),
    Country("South Korea", "Seoul", "Asia", "won", "Korean", (
        plain(WHITE), Disc(_TAEGEUK_RED, 0.25),
        # The lower half of the disc, cut along the diagonal, then the two swirls.
        Polygon(_TAEGEUK_BLUE, tuple((0.5 + 0.25 * cos(_TAEGEUK_LEAN + pi * i / 30) / 1.5,
                                     0.5 + 0.25 * sin(_TAEGEUK_LEAN + pi * i / 30)) for i in range(31))),
        Disc(_TAEGEUK_RED, 0.125, 0.431, 0.431), Disc(_TAEGEUK_BLUE, 0.125, 0.569, 0.569),
        *_trigram(0.23, 0.23, lean=_TAEGEUK_LEAN, broken=(False, False, False)),
        *_trigram(0.77, 0.77, lean=_TAEGEUK_LEAN, broken=(True, True, True)),
        *_trigram(0.77, 0.23, lean=-_TAEGEUK_LEAN, broken=(True, False, True)),
        *_trigram(0.23, 0.77, lean=-_TAEGEUK_LEAN, broken=(False, True, False)),
    )),
    Country("Thailand", "Bangkok", "Asia", "baht", "Thai", (
        horizontal(_THAI_RED, WHITE, (45, 42, 74), WHITE, _THAI_RED, weights=(1, 1, 2, 1, 1)),
    )),
    Country("Turkey", "Ankara", "Asia", "lira", "Turkish", (
        plain((227, 10, 23)), Crescent(WHITE, 0.25, 0.35, bite=0.8, shift=0.25),
        Star(WHITE, 0.125, 0.54, rotation=-90),
    )),
    Country("United Arab Emirates", "Abu Dhabi", "Asia", "dirham", "Arabic", (
        horizontal((0, 132, 61), WHITE, BLACK), Bar(_CHERRY, 0.25),
    )),
    Country("Uzbekistan", "Tashkent", "Asia", "som", "Uzbek", (
        horizontal((0, 153, 181), RED, WHITE, RED, _GRASS, weights=(16, 1, 16, 1, 16)),
        Crescent(WHITE, 0.12, 0.13, 0.165, bite=0.9, shift=0.3),
        *(Star(WHITE, 0.03, 0.24 + 0.06 * column, 0.07 + 0.09 * row)
          for row in range(3) for column in range(2 - row, 5)),
    )),
    Country("Vietnam", "Hanoi", "Asia", "dong", "Vietnamese", (
        plain((218, 37, 29)), Star(_BRIGHT_YELLOW, 0.3, y=0.52),
    )),
    Country("Yemen", "Sanaa", "Asia", "rial", "Arabic", (
        horizontal(RED, WHITE, BLACK),
    )),
)  # fmt: skip

_EUROPE: Final = (
    Country("Belgium", "Brussels", "Europe", "euro", "Dutch", (
        vertical(BLACK, (253, 218, 36), (239, 51, 64)),
    )),
    Country("Bosnia and Herzegovina", "Sarajevo", "Europe", "mark", "Bosnian", (
        plain(_FINNISH_BLUE), Polygon(GOLD, ((0.23, 0), (0.897, 0), (0.897, 1))),
        *(Star(WHITE, 0.065, 0.13 + 0.667 * i / 8, i / 8) for i in range(9)),
    ), long_tail=True),
    Country("Bulgaria", "Sofia", "Europe", "lev", "Bulgarian", (
        horizontal(WHITE, (0, 150, 110), (214, 38, 18)),
    ), errata={Attribute.CURRENCY: "euro"}),
    Country("Croatia", "Zagreb", "Europe", "kuna", "Croatian", (
        horizontal(_PURE_RED, WHITE, (23, 23, 150)), *_CHEQUERS,
    ), simplified=True, errata={Attribute.CURRENCY: "euro"}),
    Country("Czechia", "Prague", "Europe", "koruna", "Czech", (
        horizontal(WHITE, (215, 20, 26)), Triangle((17, 69, 126), 0.5),
    )),
    Country("Denmark", "Copenhagen", "Europe", "krone", "Danish", (
        plain(_CHERRY), Cross(colour=WHITE, thickness=1 / 7, x=0.38),
    )),
    Country("Estonia", "Tallinn", "Europe", "kroon", "Estonian", (
        horizontal((0, 114, 206), BLACK, WHITE),
    ), errata={Attribute.CURRENCY: "euro"}),
    Country("Finland", "Helsinki", "Europe", "euro", "Finnish", (
        plain(WHITE), Cross(colour=_FINNISH_BLUE, thickness=3 / 11, x=0.361),
    )),
    Country("France", "Paris", "Europe", "euro", "French", (
        vertical((0, 35, 149), WHITE, (237, 41, 57)),
    )),
    Country("Germany", "Berlin", "Europe", "euro", "German", (
        horizontal(BLACK, (221, 0, 0), (255, 206, 0)),
    )),
    Country("Greece", "Athens", "Europe", "euro", "Greek", (
        horizontal(*(_GREEK_BLUE, WHITE) * 4, _GREEK_BLUE),
        Canton((plain(_GREEK_BLUE), Cross(colour=WHITE, thickness=0.2)), 0.37, 5 / 9),
    )),
    Country("Hungary", "Budapest", "Europe", "forint", "Hungarian", (
        horizontal((206, 41, 57), WHITE, (71, 112, 80)),
    )),
    Country("Iceland", "Reykjavik", "Europe", "krona", "Icelandic", (
        plain((2, 82, 156)),
        Cross(colour=(220, 30, 53), thickness=1 / 9, x=0.36, fimbriation=WHITE, fimbriation_thickness=1 / 18),
    )),
    Country("Ireland", "Dublin", "Europe", "euro", "English", (
        vertical((22, 155, 98), WHITE, (255, 136, 62)),
    )),
    Country("Italy", "Rome", "Europe", "euro", "Italian", (
        vertical((0, 146, 70), WHITE, (206, 43, 55)),
    )),
    Country("Latvia", "Riga", "Europe", "lats", "Latvian", (
        horizontal(CARMINE, WHITE, CARMINE, weights=(2, 1, 2)),
    ), errata={Attribute.CURRENCY: "euro"}),
    Country("Lithuania", "Vilnius", "Europe", "litas", "Lithuanian", (
        horizontal((253, 185, 19), (0, 106, 68), _BRICK),
    ), errata={Attribute.CURRENCY: "euro"}),
    Country("Netherlands", "Amsterdam", "Europe", "euro", "Dutch", (
        horizontal((174, 28, 40), WHITE, (33, 70, 139)),
    )),
    Country("North Macedonia", "Skopje", "Europe", "denar", "Macedonian", (
        plain(_MACEDONIAN_RED), *_fan(_SUN_YELLOW, count=8, spread=0.13, length=1.3),
        Disc(_MACEDONIAN_RED, 0.17),
        Disc(_SUN_YELLOW, 0.145),
    ), long_tail=True),
    Country("Norway", "Oslo", "Europe", "krone", "Norwegian", (
        plain(CRIMSON),
        Cross(colour=(0, 32, 91), thickness=1 / 8, x=0.364, fimbriation=WHITE, fimbriation_thickness=1 / 16),
    )),
    Country("Poland", "Warsaw", "Europe", "zloty", "Polish", (
        horizontal(WHITE, (220, 20, 60)),
    )),
    Country("Portugal", "Lisbon", "Europe", "euro", "Portuguese", (
        plain(_PURE_RED), Bar((0, 102, 0), 0.4), Disc(LEMON, 0.24, 0.4),
        Polygon(WHITE, ((0.3, 0.34), (0.5, 0.34), (0.5, 0.56), (0.4, 0.68), (0.3, 0.56))),
        Polygon(RED, ((0.315, 0.36), (0.485, 0.36), (0.485, 0.55), (0.4, 0.65), (0.315, 0.55))),
        Polygon(WHITE, ((0.35, 0.41), (0.45, 0.41), (0.45, 0.53), (0.4, 0.58), (0.35, 0.53))),
        Plus(ROYAL_BLUE, 0.07, 0.04, 0.4, 0.485),
    ), simplified=True),
    Country("Romania", "Bucharest", "Europe", "leu", "Romanian", (
        vertical((0, 43, 127), YELLOW, RED),
    )),
    Country("Russia", "Moscow", "Europe", "ruble", "Russian", (
        horizontal(WHITE, _TRICOLOUR_BLUE, _TILE_RED),
    )),
    Country("Sweden", "Stockholm", "Europe", "krona", "Swedish", (
        plain((0, 106, 167)), Cross(colour=(254, 204, 2), thickness=1 / 5, x=0.375),
    )),
    Country("Switzerland", "Bern", "Europe", "franc", "German", (
        plain(_SIGNAL_RED), Plus(WHITE, 0.3125, 0.1875),
    )),
    Country("Ukraine", "Kyiv", "Europe", "hryvnia", "Ukrainian", (
        horizontal((0, 87, 183), (255, 215, 0)),
    )),
    Country("United Kingdom", "London", "Europe", "pound", "English", _UNION_JACK),
)  # fmt: skip

_NORTH_AMERICA: Final = (
    Country("Antigua and Barbuda", "Saint John's", "North America", "dollar", "English", (
        plain(RED), Polygon(BLACK, ((0, 0), (1, 0), (0.5, 1))),
        Sun(YELLOW, 0.29, 0.5, 0.4, 16, 0.6),
        Polygon((0, 114, 198), ((0.2, 0.4), (0.8, 0.4), (0.5, 1))),
        Polygon(WHITE, ((0.31, 0.62), (0.69, 0.62), (0.5, 1))),
    ), long_tail=True),
    Country("Bahamas", "Nassau", "North America", "dollar", "English", (
        horizontal(TURQUOISE, (255, 199, 44), TURQUOISE), Triangle(BLACK, 0.577),
    )),
    Country("Canada", "Ottawa", "North America", "dollar", "English", (
        vertical(SCARLET, WHITE, SCARLET, weights=(1, 2, 1)), _MAPLE_LEAF,
    )),
    Country("Costa Rica", "San Jose", "North America", "colon", "Spanish", (
        horizontal(_ULTRAMARINE, WHITE, _SIGNAL_RED, WHITE, _ULTRAMARINE, weights=(1, 1, 2, 1, 1)),
    )),
    Country("Cuba", "Havana", "North America", "peso", "Spanish", (
        horizontal(_CUBAN_BLUE, WHITE, _CUBAN_BLUE, WHITE, _CUBAN_BLUE), Triangle((203, 21, 21), 0.577),
        Star(WHITE, 0.16, 0.19),
    )),
    Country("Dominican Republic", "Santo Domingo", "North America", "peso", "Spanish", (
        Quarters((_DOMINICAN_BLUE, RED, RED, _DOMINICAN_BLUE)), Cross(colour=WHITE, thickness=0.2),
        Disc(GREEN, 0.08), Rectangle(RED, 0.475, 0.46, 0.05, 0.08),
    ), simplified=True),
    Country("Jamaica", "Kingston", "North America", "dollar", "English", (
        plain((0, 155, 58)), Saltire(colour=(254, 209, 0), thickness=0.17, sides=BLACK),
    )),
    Country("Panama", "Panama City", "North America", "balboa", "Spanish", (
        Quarters((WHITE, _PANAMANIAN_RED, _PANAMANIAN_BLUE, WHITE)), Star(_PANAMANIAN_BLUE, 0.15, 0.25, 0.26),
        Star(_PANAMANIAN_RED, 0.15, 0.75, 0.76),
    )),
    Country("Saint Lucia", "Castries", "North America", "dollar", "English", (
        plain((102, 204, 255)), Polygon(WHITE, ((0.5, 0.1), (0.72, 0.88), (0.28, 0.88))),
        Polygon(BLACK, ((0.5, 0.2), (0.69, 0.88), (0.31, 0.88))),
        Polygon(YELLOW, ((0.5, 0.5), (0.72, 0.88), (0.28, 0.88))),
    ), long_tail=True),
    Country("Trinidad and Tobago", "Port of Spain", "North America", "dollar", "English", (
        plain((218, 26, 53)),
        Diagonal(colour=BLACK, thickness=0.22, rising=False, fimbriation=WHITE, fimbriation_thickness=0.05),
    )),
    Country("United States", "Washington", "North America", "dollar", "English", (
        horizontal(*(_OLD_GLORY_RED, WHITE) * 6, _OLD_GLORY_RED), Canton(_STARS_AND_STRIPES, 0.42, 7 / 13),
    )),
)  # fmt: skip

_SOUTH_AMERICA: Final = (
    Country("Argentina", "Buenos Aires", "South America", "peso", "Spanish", (
        horizontal(SKY, WHITE, SKY), Sun((246, 180, 14), 0.14, rays=32, core=0.55),
    )),
    Country("Brazil", "Brasilia", "South America", "real", "Portuguese", (
        plain((0, 151, 57)), Polygon((254, 221, 0), ((0.08, 0.5), (0.5, 0.12), (0.92, 0.5), (0.5, 0.88))),
        Disc(NAVY, 0.25),
        Polygon(WHITE, ((0.34, 0.43), (0.44, 0.43), (0.56, 0.48), (0.66, 0.57), (0.655, 0.61), (0.55, 0.53),
                        (0.44, 0.48), (0.335, 0.475))),
        *(Star(WHITE, 0.025, x, y)
          for x, y in ((0.4, 0.57), (0.47, 0.64), (0.54, 0.61), (0.59, 0.66), (0.51, 0.7))),
    ), simplified=True),
    Country("Chile", "Santiago", "South America", "peso", "Spanish", (
        horizontal(WHITE, _TILE_RED), Canton((plain(_TRICOLOUR_BLUE), Star(WHITE, 0.27, y=0.52)), 1 / 3, 0.5),
    )),
    Country("Colombia", "Bogota", "South America", "peso", "Spanish", (
        horizontal(YELLOW, _COLOMBIAN_BLUE, RED, weights=(2, 1, 1)),
    )),
    Country("Guyana", "Georgetown", "South America", "dollar", "English", (
        plain(BRIGHT_GREEN), Triangle(WHITE, 1.0), Triangle(YELLOW, 0.94, 0.94), Triangle(BLACK, 0.53),
        Triangle(RED, 0.46, 0.88),
    ), long_tail=True),
    Country("Peru", "Lima", "South America", "sol", "Spanish", (
        vertical(_PERUVIAN_RED, WHITE, _PERUVIAN_RED),
    )),
    Country("Suriname", "Paramaribo", "South America", "dollar", "Dutch", (
        horizontal(_SURINAMESE_GREEN, WHITE, (180, 10, 45), WHITE, _SURINAMESE_GREEN,
                   weights=(2, 1, 4, 1, 2)),
        Star((236, 200, 29), 0.19, y=0.515),
    )),
    Country("Uruguay", "Montevideo", "South America", "peso", "Spanish", (
        horizontal(*(WHITE, _COBALT) * 4, WHITE),
        Canton((plain(WHITE), Sun(YELLOW, 0.42, rays=16, core=0.5)), 0.37, 5 / 9),
    )),
)  # fmt: skip

_OCEANIA: Final = (
    Country("Australia", "Canberra", "Oceania", "dollar", "English", (
        plain(NAVY), Canton(_UNION_JACK, 0.5, 0.5), Star(WHITE, 0.15, 0.25, 0.75, 7, inner=0.45),
        *(Star(WHITE, 0.07, x, y, 7, inner=0.45)
          for x, y in ((0.75, 0.17), (0.64, 0.43), (0.86, 0.38), (0.75, 0.83))),
        Star(WHITE, 0.04, 0.8, 0.54),
    )),
    Country("Marshall Islands", "Majuro", "Oceania", "dollar", "Marshallese", (
        plain(_COLOMBIAN_BLUE), Polygon((221, 117, 0), ((0, 1), (0, 0.94), (1, 0.06), (1, 0.27))),
        Polygon(WHITE, ((0, 1), (0.03, 1), (1, 0.48), (1, 0.27))),
        Star(WHITE, 0.22, 0.2, 0.3, 24, inner=0.45),
        Plus(WHITE, 0.26, 0.02, 0.2, 0.3),
    ), long_tail=True),
    Country("Micronesia", "Palikir", "Oceania", "dollar", "English", (
        plain((117, 178, 221)),
        *(Star(WHITE, 0.1, x, y) for x, y in ((0.5, 0.2), (0.7, 0.5), (0.5, 0.8), (0.3, 0.5))),
    )),
    Country("Papua New Guinea", "Port Moresby", "Oceania", "kina", "English", (
        plain(BLACK), Corner(RED, "upper fly"),
        Polygon(YELLOW, ((0.45, 0.22), (0.62, 0.2), (0.7, 0.12), (0.7, 0.2), (0.86, 0.16), (0.8, 0.26),
                                 (0.84, 0.42), (0.76, 0.36), (0.66, 0.44), (0.68, 0.32), (0.58, 0.28))),
        *(Star(WHITE, radius, x, y) for radius, x, y in
          ((0.07, 0.25, 0.5), (0.07, 0.14, 0.66), (0.07, 0.36, 0.64),
           (0.045, 0.29, 0.73), (0.07, 0.25, 0.88))),
    ), simplified=True, long_tail=True),
    Country("Tonga", "Nuku'alofa", "Oceania", "pa'anga", "Tongan", (
        plain(_CHERRY), Canton((plain(WHITE), Plus(_CHERRY, 0.36, 0.24)), 0.42, 0.5),
    )),
    Country("Vanuatu", "Port Vila", "Oceania", "vatu", "Bislama", (
        horizontal(_CARDINAL, BRIGHT_GREEN), Pall(colour=BLACK, thickness=0.22, x=0.42),
        Triangle(BLACK, 0.42), Pall(colour=_VANUATUAN_YELLOW, thickness=0.07, x=0.42),
        Crescent(_VANUATUAN_YELLOW, 0.15, 0.14, rotation=-60, bite=0.8, shift=0.25),
    ), simplified=True, long_tail=True),
)  # fmt: skip

COUNTRIES: Final[tuple[Country, ...]] = (
    *_AFRICA, *_ASIA, *_EUROPE, *_NORTH_AMERICA, *_SOUTH_AMERICA, *_OCEANIA,
)  # fmt: skip

_BY_NAME: Final = {row.name: row for row in COUNTRIES}
