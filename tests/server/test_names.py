"""Names that pass can never become paths; the others are refused with their form."""

import re
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from errata.server.errors import MalformedError
from errata.server.ledger.rows import JobKind
from errata.server.names import (
    VersionRef,
    alias_name,
    alias_of,
    alias_part,
    job_name,
    job_of,
    model_name,
    model_of,
    model_part,
    version_name,
    version_of,
    version_ref,
)

MODELS = st.from_regex(r"\A[a-z0-9]([a-z0-9_-]|\.(?!\.)){0,63}\Z")
ALIASES = st.from_regex(r"\A[a-z0-9-]{1,64}\Z").filter(lambda a: not re.fullmatch(r"latest|v[0-9]+", a))
NUMBERS = st.integers(0, 999_999_999)
IDS = st.from_regex(r"\A[0-9a-f]{32}\Z")

NOT_MODELS = [
    "",
    "models/",
    "models",
    "atlas",
    "Models/atlas",
    "models/Atlas",
    "models/..",
    "models/.",
    "models/.hidden",
    "models/a..b",
    "models/../etc",
    "models/a/../b",
    "models/a%2Fb",
    "models/%2e%2e",
    "models/a\\b",
    "models/a/b",
    "/models/atlas",
    "models//atlas",
    "models/atlas/",
    "models/atlas\n",
    "models/atlas\x00",
    " models/atlas",
    "models/аtlas",
    "models/atlas１",
    "models／atlas",
    "models/" + "a" * 65,
    "models/-a",
]


@pytest.mark.parametrize("name", NOT_MODELS)
def test_what_is_no_models_name_is_refused_with_field_and_form(name: str) -> None:
    with pytest.raises(MalformedError, match=re.escape("models/{model}")) as caught:
        model_of(name, "parent")
    assert (caught.value.field, caught.value.said_reason) == ("parent", "MALFORMED_NAME")


@pytest.mark.parametrize("name", NOT_MODELS)
def test_no_name_below_it_is_taken_either(name: str) -> None:
    for parse in (
        lambda: version_ref(f"{name}/versions/1", "version"),
        lambda: version_of(f"{name}/versions/1", "version"),
        lambda: alias_of(f"{name}/aliases/champion", "name"),
        lambda: job_of(f"{name}/edits/0197", JobKind.EDIT, "name"),
    ):
        with pytest.raises(MalformedError):
            parse()


@pytest.mark.parametrize(
    "part",
    [
        "",
        "01",
        "-1",
        "+1",
        " 1",
        "1 ",
        "1\n",
        "1.0",
        "1e3",
        "1000000000",
        "٣",
        "१",
        "1/",
        "1/2",
        "..",
        "%31",
        "champion",
    ],
)
def test_a_version_has_one_spelling(part: str) -> None:
    with pytest.raises(MalformedError):
        version_ref(f"models/atlas/versions/{part}", "version")


@pytest.mark.parametrize("alias", ["", "Champion", "a_b", "a.b", "..", "a/b", "a%2f", "chаmpion", "a" * 65, "a\n"])
def test_what_is_no_alias_is_refused(alias: str) -> None:
    with pytest.raises(MalformedError):
        alias_of(f"models/atlas/aliases/{alias}", "name")
    with pytest.raises(MalformedError):
        alias_part(alias, "alias")


@pytest.mark.parametrize("alias", ["latest", "v1", "v20"])
def test_what_mlflow_keeps_for_itself_is_no_alias(alias: str) -> None:
    with pytest.raises(MalformedError, match="latest"):
        alias_part(alias, "alias")
    with pytest.raises(MalformedError, match="latest"):
        version_ref(f"models/atlas/aliases/{alias}", "version")


def test_a_look_alike_is_shown_as_what_it_is() -> None:
    with pytest.raises(MalformedError, match=re.escape(r"\u0430tlas")):
        model_of("models/аtlas", "parent")


def test_a_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(MalformedError) as caught:
        model_of("models/" + "a" * 100_000, "parent")
    assert len(str(caught.value)) < 400


def test_a_models_own_name_means_its_champion() -> None:
    assert version_ref("models/atlas", "version") == VersionRef("atlas", None, "champion")
    assert version_ref("models/atlas", "version").name == "models/atlas/aliases/champion"


@pytest.mark.parametrize(("kind", "other"), [(k, o) for k in JobKind for o in JobKind if k is not o])
def test_a_job_of_another_kind_is_refused(kind: JobKind, other: JobKind) -> None:
    with pytest.raises(MalformedError):
        job_of(job_name(other, "atlas", "0197"), kind, "name")


@given(model=MODELS, number=NUMBERS, alias=ALIASES, id=IDS)
def test_names_are_read_back_as_they_were_written(model: str, number: int, alias: str, id: str) -> None:
    assert model_of(model_name(model), "f") == model
    assert version_of(version_name(model, number), "f") == (model, number)
    assert version_ref(version_name(model, number), "f") == VersionRef(model, number, None)
    assert version_ref(version_name(model, number), "f").name == version_name(model, number)
    assert version_ref(alias_name(model, alias), "f") == VersionRef(model, None, alias)
    assert alias_of(alias_name(model, alias), "f") == (model, alias)
    for kind in JobKind:
        assert job_of(job_name(kind, model, id), kind, "f") == (model, id)


_PIECES = st.sampled_from(
    ["models", "versions", "aliases", "edits", "traces", "/", "..", ".", "%2f", "\\", "a", "1", "\n"]
)
NEARLY_NAMES = st.text() | st.lists(_PIECES).map("".join) | st.text().map("models/{}".format)


def job_parts(text: str, kind: JobKind) -> list[str]:
    return list(job_of(text, kind, "f"))


@given(NEARLY_NAMES)
@example("models/a./versions/1")
def test_no_text_yields_a_part_that_could_be_a_path(text: str) -> None:
    parsers: list[Callable[[], list[str]]] = [
        lambda: [model_of(text, "f")],
        lambda: [model_part(text, "f")],
        lambda: [alias_part(text, "f")],
        lambda: [version_of(text, "f")[0]],
        lambda: [p for p in (version_ref(text, "f").model, version_ref(text, "f").alias) if p is not None],
        lambda: list(alias_of(text, "f")),
        *(partial(job_parts, text, kind) for kind in JobKind),
    ]
    for parse in parsers:
        try:
            parts = parse()
        except MalformedError:
            continue
        for part in parts:
            assert part
            assert re.fullmatch(r"[a-z0-9._-]+", part)
            assert ".." not in part
            assert not part.startswith(".")
