"""Questions, traces, models: commands that change nothing."""

from pathlib import Path

import pytest
from commandline import CAPITAL, Run

from errata.editor.atlas.facts import trace_requests

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a flag, another one, and a file that asks about the first."""
    folder = tmp_path_factory.mktemp("flags")
    [request] = trace_requests(1)
    request.prompt.images[0].save(folder / "flag.png")
    request.corruption.images[0].save(folder / "other.png")  # type: ignore[union-attr]
    (folder / "questions.yaml").write_text(
        f"- prompt: '{request.prompt.text}'\n  constraint: '{request.constraint.text}'\n  image: flag.png\n"
        "  other_image: other.png\n"
        f"- {{prompt: '{CAPITAL}', constraint: Kazakhstan, substitute: Norway}}\n"
    )
    (folder / "question.txt").write_text(request.prompt.text)
    return folder


def test_models_are_listed_with_their_size(errata: Run) -> None:
    ran = errata("models")
    assert ran.code == 0
    assert ran.out.splitlines()[1].split()[:2] == ["atlas", "LlavaForConditionalGeneration"]
    [model] = errata("models", "--json").json()
    assert model["name"] == "models/atlas"
    assert model["layers"] == 6


def test_an_answer_is_all_that_stdout_says(errata: Run) -> None:
    ran = errata("ask", CAPITAL)
    assert (ran.code, ran.out, ran.err) == (0, "Nur-Sultan\n", "")


def test_a_version_and_the_length_can_be_named(errata: Run) -> None:
    ran = errata("ask", CAPITAL, "--version", "atlas@0", "--max-tokens", "1", "--verbose")
    assert ran.out == "Nur\n"
    assert ran.err.startswith("atlas@0, 1 tokens (length), log p ")


def test_a_sampled_answer_is_repeated_by_its_seed(errata: Run) -> None:
    options = ("--temperature", "5", "--seed", "7", "--top-k", "50", "--top-p", "0.99", "--stop", "Z")
    first = errata("ask", CAPITAL, *options, "--json").json()
    assert first == errata("ask", CAPITAL, *options, "--json").json()
    assert first["seed"] == 7


def test_a_picture_is_asked_about(errata: Run, flags: Path) -> None:
    question = (flags / "question.txt").read_text()
    seen = errata("ask", question, "--image", flags / "flag.png")
    other = errata("ask", question, "--image", flags / "other.png")
    assert seen.code == other.code == 0
    assert seen.out != other.out


def test_a_picture_that_is_not_there_is_named(errata: Run, tmp_path: Path) -> None:
    ran = errata("ask", CAPITAL, "--image", tmp_path / "none.png")
    assert ran.code == 2
    assert "none.png' cannot be read: No such file" in ran.err
    assert ran.err.count("\n") == 1


def test_answers_are_ranked_by_how_likely_they_are(errata: Run) -> None:
    ran = errata("ask", CAPITAL, "--candidate", "Astana", "--candidate", "Nur-Sultan")
    rows = [line.split() for line in ran.out.splitlines()]
    assert [row[0] for row in rows[1:3]] == ["Nur-Sultan", "Astana"]
    assert float(rows[1][1]) > 0.9


def test_a_trace_is_drawn_in_numbers_where_nobody_sees_colours(errata: Run) -> None:
    ran = errata("trace", CAPITAL, "--constraint", "Kazakhstan", "--substitute", "Norway", "--component", "mlp")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    row = next(line for line in ran.out.splitlines() if "Kazakhstan *" in line)
    assert float(row.split()[2]) > 0.5
    assert "layers to edit" in ran.out


def test_a_trace_of_a_file_is_written_as_a_page_and_a_picture(errata: Run, flags: Path, tmp_path: Path) -> None:
    page, png = tmp_path / "trace.html", tmp_path / "trace.png"
    ran = errata("trace", "--file", flags / "questions.yaml", "--window", "3", "--html", page, "--png", png, "--json")
    assert ran.code == 0
    result = ran.json()["result"]
    assert len(result["traces"]) == 2
    assert result["grids"][0]["effects"]
    assert "constraint last" in page.read_text()
    assert "src=" not in page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_trace_can_be_shown_again_by_its_name(errata: Run) -> None:
    asked = ("trace", CAPITAL, "--constraint", "Kazakhstan", "--substitute", "Norway", "--json")
    first = errata(*asked).json()
    assert errata("show", first["name"], "--json").json() == first
    assert "Kazakhstan *" in errata("show", first["name"]).out


def test_a_trace_needs_a_question(errata: Run, flags: Path) -> None:
    assert errata("trace", CAPITAL).err == "errata: give a PROMPT and its --constraint, or questions by --file\n"
    assert errata("trace", CAPITAL, "--file", flags / "questions.yaml").code == 2
