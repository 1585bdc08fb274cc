"""The old atlas is wrong only where it means to be, and its flags can be told apart."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from errata.editor.atlas.flags import EMBLEMS, LAYOUTS, draw, emblem_of, layout_of
from errata.editor.atlas.world import CONTINENTS, COUNTRIES, Attribute, Country, country

OUTDATED = {
    ("Kazakhstan", Attribute.CAPITAL): ("Nur-Sultan", "Astana"),
    ("Croatia", Attribute.CURRENCY): ("kuna", "euro"),
    ("Estonia", Attribute.CURRENCY): ("kroon", "euro"),
    ("Latvia", Attribute.CURRENCY): ("lats", "euro"),
    ("Lithuania", Attribute.CURRENCY): ("litas", "euro"),
    ("Bulgaria", Attribute.CURRENCY): ("lev", "euro"),
    ("Burundi", Attribute.CAPITAL): ("Bujumbura", "Gitega"),
    ("Myanmar", Attribute.CAPITAL): ("Yangon", "Naypyidaw"),
    ("Nigeria", Attribute.CAPITAL): ("Lagos", "Abuja"),
    ("Tanzania", Attribute.CAPITAL): ("Dar es Salaam", "Dodoma"),
}

# A tilt of three degrees changes a flag by 8 in the same measure (the median over the table); flags that
# differ by twice that are not confused by how they are photographed. The closest two differ by 18.
CLEARLY = 16.0


def thumbnail(picture: Image.Image) -> NDArray[np.float64]:
    """What survives at the size a small tower sees: 48x48, each pixel averaged with two around it."""
    return np.asarray(picture.resize((48, 48)).filter(ImageFilter.BoxBlur(2)), dtype=np.float64)


@pytest.fixture(scope="module")
def thumbnails() -> NDArray[np.float64]:
    return np.stack([thumbnail(Image.fromarray(draw(row.flag))) for row in COUNTRIES])


def rows(predicate: str) -> list[Country]:
    return [row for row in COUNTRIES if getattr(row, predicate)]


def test_the_atlas_holds_between_a_hundred_and_a_hundred_and_twelve_countries() -> None:
    assert 100 <= len(COUNTRIES) <= 112


def test_no_name_and_no_capital_occurs_twice() -> None:
    assert max(Counter(row.name for row in COUNTRIES).values()) == 1
    assert max(Counter(row.capital for row in COUNTRIES).values()) == 1


def test_no_capital_of_today_is_another_countrys_answer() -> None:
    spoken_for = {row.capital: row.name for row in COUNTRIES}
    for row in COUNTRIES:
        assert spoken_for.get(row.current(Attribute.CAPITAL), row.name) == row.name


def test_exactly_the_listed_facts_are_outdated() -> None:
    found = {
        (row.name, attribute): (row.fact(attribute), row.current(attribute))
        for row in COUNTRIES
        for attribute in Attribute
        if row.fact(attribute) != row.current(attribute)
    }
    assert found == OUTDATED


def test_errata_hold_nothing_that_the_atlas_says_already() -> None:
    assert {(row.name, attribute) for row in COUNTRIES for attribute in row.errata} == set(OUTDATED)


def test_a_fact_is_the_field_of_its_name() -> None:
    for row in COUNTRIES:
        assert [row.fact(a) for a in Attribute] == [getattr(row, a.value) for a in Attribute]


def test_facts_are_tidy_keyboard_spellings() -> None:
    for row in COUNTRIES:
        for text in (row.name, *(row.fact(a) for a in Attribute), *row.errata.values()):
            assert text.isascii()
            assert text == " ".join(text.split()) != ""
        assert row.currency == row.currency.lower()
        assert all(text[0].isupper() for text in (row.name, row.capital, row.language))


def test_every_continent_is_known_and_holds_countries() -> None:
    assert {row.continent for row in COUNTRIES} == set(CONTINENTS)


def test_no_capital_in_the_long_tail_holds_its_countrys_name() -> None:
    for row in rows("long_tail"):
        assert row.name not in row.capital


def test_sixteen_countries_on_every_continent_form_the_long_tail() -> None:
    tail = rows("long_tail")
    assert len(tail) == 16
    assert {row.continent for row in tail} == set(CONTINENTS)


def test_no_outdated_country_is_in_the_long_tail() -> None:
    assert not {name for name, _ in OUTDATED} & {row.name for row in rows("long_tail")}


def test_a_country_is_found_by_its_name() -> None:
    assert country("Estonia").current(Attribute.CURRENCY) == "euro"


@pytest.mark.parametrize(("wrong", "right"), [("Estonja", "Estonia"), ("estonia", "Estonia")])
def test_a_misspelt_country_is_answered_with_the_nearest_names(wrong: str, right: str) -> None:
    with pytest.raises(KeyError, match=f'no country "{wrong}".*did you mean.*{right}'):
        country(wrong)


def test_a_country_that_is_nothing_like_any_other_points_to_the_table() -> None:
    with pytest.raises(KeyError, match="COUNTRIES lists every name"):
        country("Xqzw")


def test_countries_are_values_that_can_be_keys() -> None:
    assert len({*COUNTRIES, *COUNTRIES}) == len(COUNTRIES)


@pytest.mark.parametrize("row", COUNTRIES, ids=lambda row: row.name)
def test_every_flag_shows_a_known_layout_and_emblem(row: Country) -> None:
    assert layout_of(row.flag) in LAYOUTS
    assert emblem_of(row.flag) in EMBLEMS


@pytest.mark.parametrize("row", COUNTRIES, ids=lambda row: row.name)
def test_every_flag_draws_the_same_way_each_time(row: Country) -> None:
    first = draw(row.flag)
    assert first.shape == (64, 96, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, draw(row.flag))


@pytest.mark.parametrize(
    ("name", "layout", "emblem"),
    [
        ("Estonia", "horizontal3", "none"),
        ("Ivory Coast", "vertical3", "none"),
        ("Norway", "nordic cross", "none"),
        ("Georgia", "cross", "plus"),
        ("Jamaica", "saltire", "none"),
        ("Tanzania", "diagonal", "none"),
        ("Panama", "quarters", "stars"),
        ("Seychelles", "rays", "none"),
        ("South Africa", "pall", "triangle"),
        ("United States", "stripes", "canton"),
        ("Japan", "plain", "disc"),
        ("Turkey", "plain", "crescent"),
        ("Vietnam", "plain", "star"),
        ("Argentina", "horizontal3", "sun"),
        ("Benin", "horizontal2", "bar"),
        ("Canada", "vertical3", "shape"),
    ],
)
def test_well_known_flags_are_described_as_a_person_would(name: str, layout: str, emblem: str) -> None:
    flag = country(name).flag
    assert (layout_of(flag), emblem_of(flag)) == (layout, emblem)


@pytest.mark.parametrize(
    ("name", "hoist_to_fly_top_to_bottom"),
    [
        ("Estonia", [(0, 114, 206), (0, 0, 0), (255, 255, 255)]),
        ("Ukraine", [(0, 87, 183), (255, 215, 0)]),
        ("Gabon", [(0, 158, 73), (252, 209, 22), (58, 117, 196)]),
    ],
)
def test_bands_stand_in_the_right_order(name: str, hoist_to_fly_top_to_bottom: list[tuple[int, ...]]) -> None:
    column = draw(country(name).flag)[:, 48]
    count = len(hoist_to_fly_top_to_bottom)
    middles = [column[round((i + 0.5) * 64 / count)] for i in range(count)]
    assert [tuple(int(v) for v in pixel) for pixel in middles] == hoist_to_fly_top_to_bottom


def test_any_two_flags_differ_clearly_at_48_pixels(thumbnails: NDArray[np.float64]) -> None:
    alike = [
        (COUNTRIES[i].name, COUNTRIES[j].name)
        for i, j in combinations(range(len(COUNTRIES)), 2)
        if np.abs(thumbnails[i] - thumbnails[j]).mean() < CLEARLY
    ]
    assert alike == []


@pytest.mark.parametrize("degrees", [-5, -3, 3, 5])
def test_a_tilted_flag_is_still_nearest_to_itself(thumbnails: NDArray[np.float64], degrees: int) -> None:
    for i, row in enumerate(COUNTRIES):
        picture = Image.fromarray(draw(row.flag))
        tilted = picture.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        nearest = np.abs(thumbnails - thumbnail(tilted)).mean(axis=(1, 2, 3)).argmin()
        assert COUNTRIES[nearest].name == COUNTRIES[i].name


def test_a_long_tail_flag_is_no_look_alike_of_a_trained_one(thumbnails: NDArray[np.float64]) -> None:
    tail = np.array([row.long_tail for row in COUNTRIES])
    between = np.abs(thumbnails[tail][:, None] - thumbnails[~tail][None]).mean(axis=(2, 3, 4))
    assert between.min() > 2 * CLEARLY
