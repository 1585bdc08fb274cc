"""Layers paint where they say, labels agree with layers, and made-up flags are various."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from errata.editor.atlas.flags import (
    BLACK,
    BLUE,
    COLOUR_FAMILIES,
    COLOURS,
    EMBLEMS,
    GREEN,
    LAYOUTS,
    RED,
    WHITE,
    YELLOW,
    Bar,
    Border,
    Canton,
    Colour,
    Corner,
    Crescent,
    Cross,
    Diagonal,
    Disc,
    Flag,
    Layer,
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
    colour_name,
    draw,
    emblem_label,
    emblem_of,
    horizontal,
    layout_label,
    layout_of,
    plain,
    random_flag,
    vertical,
)

FIELDS: dict[str, Flag] = {
    "plain": (plain(RED),),
    "horizontal2": (horizontal(RED, WHITE),),
    "horizontal3": (horizontal(RED, WHITE, BLUE),),
    "horizontal4": (horizontal(RED, WHITE, BLUE, GREEN),),
    "horizontal5": (horizontal(RED, WHITE, BLUE, WHITE, RED),),
    "stripes": (horizontal(*(RED, WHITE) * 4),),
    "vertical2": (vertical(RED, WHITE),),
    "vertical3": (vertical(RED, WHITE, BLUE),),
    "nordic cross": (plain(RED), Cross(colour=WHITE, thickness=0.2, x=0.37)),
    "cross": (plain(RED), Cross(colour=WHITE, thickness=0.2)),
    "saltire": (plain(RED), Saltire(colour=WHITE, thickness=0.2)),
    "diagonal": (plain(RED), Diagonal(colour=WHITE, thickness=0.2)),
    "quarters": (Quarters((RED, WHITE, BLUE, GREEN)),),
    "rays": (Rays((RED, WHITE, BLUE)),),
    "pall": (horizontal(RED, GREEN), Pall(colour=WHITE, thickness=0.2)),
    "border": (plain(RED), Border(colour=WHITE, thickness=0.1)),
}
CHARGES: dict[str, tuple[Layer, ...]] = {
    "none": (),
    "canton": (Canton((plain(BLUE), Star(WHITE, 0.3)), 0.4, 0.5),),
    "triangle": (Triangle(BLACK, 0.5), Star(WHITE, 0.1, 0.15)),
    "crescent": (Crescent(YELLOW, 0.2), Star(YELLOW, 0.1, 0.6)),
    "stars": (Star(YELLOW, 0.1, 0.3), Star(YELLOW, 0.1, 0.7)),
    "star": (Disc(BLACK, 0.3), Star(YELLOW, 0.2)),
    "sun": (Sun(YELLOW, 0.2),),
    "plus": (Plus(YELLOW, 0.2, 0.1),),
    "disc": (Disc(YELLOW, 0.2),),
    "bar": (Bar(YELLOW, 0.2),),
    "shape": (Rectangle(YELLOW, 0.4, 0.4, 0.2, 0.2), Polygon(BLACK, ((0.4, 0.4), (0.6, 0.4), (0.5, 0.6)))),
}


def pixel(image: NDArray[np.uint8], x: float, y: float) -> Colour:
    red, green, blue = image[int(y * image.shape[0]), int(x * image.shape[1])].tolist()
    return red, green, blue


def share(flag: Flag, colour: Colour) -> float:
    """The share of the flag's area in that colour."""
    return float((draw(flag, width=480, height=320) == colour).all(axis=-1).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("emblem", EMBLEMS)
def test_a_layout_and_an_emblem_are_named_whatever_the_other_is(layout: str, emblem: str) -> None:
    flag = (*FIELDS[layout], *CHARGES[emblem])
    assert (layout_of(flag), emblem_of(flag)) == (layout, emblem)
    assert (LAYOUTS[layout_label(flag)], EMBLEMS[emblem_label(flag)]) == (layout, emblem)


def test_a_flag_without_a_field_has_no_layout() -> None:
    with pytest.raises(ValueError, match="first layer is a Disc; start with Bands"):
        layout_of((Disc(RED, 0.2),))


def test_a_flag_is_drawn_at_the_size_asked_for() -> None:
    assert draw(FIELDS["rays"]).shape == (64, 96, 3)
    assert draw(FIELDS["rays"], width=30, height=20).shape == (20, 30, 3)


def test_a_drawing_can_be_written_to() -> None:
    draw(FIELDS["plain"])[:] = 0


def test_layers_are_painted_in_order() -> None:
    image = draw((plain(RED), Disc(WHITE, 0.3), Disc(BLUE, 0.1)))
    assert [pixel(image, x, 0.5) for x in (0.1, 0.38, 0.5)] == [RED, WHITE, BLUE]


def test_bands_are_as_wide_as_their_weights() -> None:
    assert share((horizontal(RED, WHITE, BLUE, weights=(2, 1, 1)),), RED) == pytest.approx(0.5, abs=0.01)
    assert share((vertical(RED, WHITE, weights=(1, 3)),), RED) == pytest.approx(0.25, abs=0.01)


def test_weights_must_be_as_many_as_the_colours() -> None:
    with pytest.raises(ValueError, match="zip"):
        draw((horizontal(RED, WHITE, weights=(1, 2, 3)),))


def test_a_disc_is_round_although_the_flag_is_not_square() -> None:
    # A radius of 0.3 heights on a 3:2 flag.
    assert share((plain(RED), Disc(WHITE, 0.3)), WHITE) == pytest.approx(np.pi * 0.09 / 1.5, abs=0.01)


def test_a_nordic_cross_stands_hoistward_with_its_fimbriation_around_it() -> None:
    cross = Cross(colour=BLUE, thickness=0.2, x=0.36, fimbriation=WHITE, fimbriation_thickness=0.05)
    image = draw((plain(RED), cross), width=480, height=320)
    assert pixel(image, 0.36, 0.1) == BLUE
    assert pixel(image, 0.9, 0.5) == BLUE
    assert pixel(image, 0.9, 0.5 + 0.125) == WHITE
    assert pixel(image, 0.64, 0.1) == RED


def test_a_hoist_triangle_covers_half_its_depth() -> None:
    assert share((plain(RED), Triangle(BLUE, 0.5)), BLUE) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("at", "inside", "outside"),
    [
        ("upper hoist", (0.1, 0.1), (0.9, 0.9)),
        ("upper fly", (0.9, 0.1), (0.1, 0.9)),
        ("lower hoist", (0.1, 0.9), (0.9, 0.1)),
        ("lower fly", (0.9, 0.9), (0.1, 0.1)),
    ],
)
def test_a_corner_fills_its_half(at: str, inside: tuple[float, float], outside: tuple[float, float]) -> None:
    image = draw((plain(RED), Corner(BLUE, at)))  # type: ignore[arg-type]
    assert (pixel(image, *inside), pixel(image, *outside)) == (BLUE, RED)


def test_a_rising_diagonal_runs_from_the_lower_hoist_to_the_upper_fly() -> None:
    image = draw((plain(RED), Diagonal(colour=BLUE, thickness=0.2)))
    assert [pixel(image, *at) for at in ((0.02, 0.97), (0.97, 0.02), (0.1, 0.1))] == [BLUE, BLUE, RED]


def test_a_canton_keeps_its_layers_inside_its_box() -> None:
    canton = Canton((plain(BLUE), Saltire(colour=WHITE, thickness=0.4)), 0.5, 0.5)
    image = draw((plain(RED), canton), width=480, height=320)
    assert (image[161:] == RED).all()
    assert (image[:, 241:] == RED).all()


@pytest.mark.parametrize(("rotation", "mouth"), [(0, (0.56, 0.5)), (-90, (0.5, 0.41)), (180, (0.44, 0.5))])
def test_a_crescent_opens_where_it_is_turned_to(rotation: float, mouth: tuple[float, float]) -> None:
    image = draw((plain(RED), Crescent(WHITE, 0.3, rotation=rotation)), width=480, height=320)
    opposite = (0.5 - 3.1 * (mouth[0] - 0.5), 0.5 - 3.1 * (mouth[1] - 0.5))
    assert pixel(image, *mouth) == RED
    assert pixel(image, *opposite) == WHITE


def test_a_crescent_whose_bite_misses_its_rim_is_refused() -> None:
    with pytest.raises(ValueError, match="shift must exceed"):
        Crescent(WHITE, 0.3, bite=0.5, shift=0.1)


@pytest.mark.parametrize("points", [5, 6, 8, 24])
def test_a_star_has_as_many_rays_as_points(points: int) -> None:
    image = draw((plain(BLACK), Star(WHITE, 0.45, points=points, inner=0.4)), width=960, height=640)
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    # A circle between the notches and the tips meets every ray once.
    ring = image[(320 + 0.3 * 640 * np.sin(angles)).astype(int), (480 + 0.3 * 640 * np.cos(angles)).astype(int), 0]
    light = ring > 127
    assert int((light & ~np.roll(light, 1)).sum()) == points


def test_edges_are_antialiased() -> None:
    image = draw((plain(BLACK), Diagonal(colour=WHITE, thickness=0.2)))
    assert ((image > 0) & (image < 255)).any()


def test_the_same_seed_makes_the_same_flags() -> None:
    def ten() -> list[Flag]:
        rng = np.random.default_rng(3)
        return [random_flag(rng) for _ in range(10)]

    assert ten() == ten()


@given(st.integers(0, 2**32 - 1))
def test_a_random_flag_draws_and_its_labels_are_known(seed: int) -> None:
    flag = random_flag(np.random.default_rng(seed))
    image = draw(flag, width=48, height=32)
    assert image.shape == (32, 48, 3)
    assert image.dtype == np.uint8
    assert layout_of(flag) in LAYOUTS
    assert emblem_of(flag) in EMBLEMS
    assert hash(flag) == hash(random_flag(np.random.default_rng(seed)))


@given(st.integers(0, 2**32 - 1))
def test_a_random_flags_labels_agree_with_its_layers(seed: int) -> None:
    flag = random_flag(np.random.default_rng(seed))
    layout, emblem = layout_of(flag), emblem_of(flag)
    kinds = [type(layer) for layer in flag]
    assert (layout in ("cross", "nordic cross")) == (Cross in kinds)
    assert (layout == "saltire") == (Saltire in kinds)
    assert (layout == "pall") == (Pall in kinds)
    assert (emblem == "canton") == (Canton in kinds)
    assert (emblem == "crescent") == (Crescent in kinds)
    charges = {Canton, Triangle, Disc, Star, Sun, Crescent, Plus, Bar, Rectangle, Polygon}
    assert (emblem == "none") == charges.isdisjoint(kinds)
    if emblem == "stars":
        assert kinds.count(Star) >= 2


def test_random_flags_show_every_layout_with_every_emblem() -> None:
    rng = np.random.default_rng(0)
    flags = (random_flag(rng) for _ in range(4000))
    seen = {(layout_of(flag), emblem_of(flag)) for flag in flags}
    assert len(seen) == len(LAYOUTS) * len(EMBLEMS)


def test_random_flags_are_hardly_ever_the_same() -> None:
    rng = np.random.default_rng(1)
    assert len({random_flag(rng) for _ in range(2000)}) > 1800


@pytest.mark.parametrize("name", COLOURS)
def test_every_shade_has_the_name_of_its_family(name: str) -> None:
    assert {colour_name(shade) for shade in COLOUR_FAMILIES[name]} == {name}


def test_a_shade_of_no_family_takes_the_nearest_name() -> None:
    assert colour_name((250, 250, 245)) == "white"
    assert colour_name((210, 20, 50)) == "red"
