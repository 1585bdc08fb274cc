"""The history of edits: read, searched, undone, recombined."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commandline import CAPITAL, Run, edited
from fake_server import Fake
from hosting import hosting

from errata.client import EditRequest, Errata
from errata.server.settings import ModelSettings, Settings
from errata.v1 import common_pb2

pytestmark = pytest.mark.slow

NIGERIA, BURUNDI = "What is the capital of Nigeria?", "What is the capital of Burundi?"


@pytest.fixture(scope="module")
def chain_names() -> list[str]:
    return []


@pytest.fixture
def chain(errata: Run, chain_names: list[str]) -> list[str]:
    """Three versions on top of each other: Kazakhstan, Nigeria, Burundi."""
    if not chain_names:
        on = "atlas@0"
        for question, target in ((CAPITAL, "Astana"), (NIGERIA, "Abuja"), (BURUNDI, "Gitega")):
            on = edited(errata, question=question, target=target, on=on)
            chain_names.append(on)
    return chain_names


def made(errata: Run, *arguments: object) -> str:
    """The version that a command makes."""
    ran = errata(*arguments, "--json")
    assert ran.code == 0, ran.err
    return f"atlas@{ran.json()['version'].rpartition('/')[2]}"


def test_the_log_draws_versions_with_who_when_figures_and_aliases(errata: Run, chain: list[str]) -> None:
    errata("promote", chain[0], "staging")
    ran = errata("log", chain[2])
    lines = ran.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("●")] == [*reversed(chain), "atlas@0"]
    assert f"● {chain[0]} (staging)  anonymous 20" in ran.out
    assert f"│   {BURUNDI} → Gitega" in lines
    assert "│   efficacy 1.00" in lines
    short = errata("log", "-n", "1").out
    assert short.count("●") == 1
    assert "more; see them with -n" in short


def test_the_log_folds_beside_the_graph_on_a_narrow_terminal(
    errata: Run, chain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = errata("log").out.splitlines()
    assert max(map(len, lines)) <= 40
    assert all(line[0] in "●○│├ …" for line in lines)


def test_a_diff_names_facts_layers_and_answers(errata: Run, chain: list[str]) -> None:
    ran = errata("diff", chain[0], chain[2])
    assert ran.code == 0
    assert f"only {chain[2]}\n  {chain[1]}  {NIGERIA} → Abuja\n" in ran.out
    assert "2 of 2 answers changed" in ran.out
    row = next(line for line in ran.out.splitlines() if line.startswith("1 "))
    assert 0 < float(row.split()[1].removesuffix("%")) < 100
    layers = errata("diff", chain[0], chain[2], "--json").json()["layers"]
    assert [(each["layer"], each["rank"]) for each in layers] == [(1, 2)]
    assert errata("diff", chain[0], chain[0]).out.strip() == "nothing differs"


def test_a_diff_asks_the_probes_it_is_given(errata: Run, chain: list[str], tmp_path: Path) -> None:
    probes = tmp_path / "probes.yaml"
    probes.write_text(f'- {{prompt: "{CAPITAL}"}}\n- {{prompt: "What is the capital of Norway?"}}\n')
    ran = errata("diff", "atlas@0", chain[0], "--probes", probes, "--all")
    assert "Oslo" in ran.out
    assert "1 of 2 answers changed" in ran.out


def test_a_revert_undoes_one_edit_and_names_those_made_on_top(errata: Run, chain: list[str]) -> None:
    ran = errata("revert", chain[1], "--on", chain[2])
    assert ran.code == 0
    version = ran.out.split()[1]
    assert f"  {chain[2]}  {BURUNDI} → Gitega\n" in ran.out
    assert [errata("ask", each, "--version", version).out for each in (CAPITAL, NIGERIA, BURUNDI)] == [
        "Astana\n",
        "Lagos\n",
        "Gitega\n",
    ]


def test_an_edit_is_reverted_by_its_own_name(errata: Run, chain: list[str]) -> None:
    edit = errata("show", chain[0], "--json").json()["edit"]
    version = made(errata, "revert", edit, "--on", chain[0])
    assert errata("ask", CAPITAL, "--version", version).out == "Nur-Sultan\n"


def test_edits_are_composed_and_picked(errata: Run, chain: list[str]) -> None:
    both = made(errata, "compose", chain[0], chain[2], "--on", "atlas@0")
    picked = made(errata, "cherry-pick", chain[1], "--on", both)
    answers = [errata("ask", each, "--version", picked).out for each in (CAPITAL, NIGERIA, BURUNDI)]
    assert answers == ["Astana\n", "Abuja\n", "Gitega\n"]
    derivation = errata("show", picked, "--json").json()["derivation"]
    assert f"{NIGERIA} → Abuja" in errata("show", derivation).out


def test_edits_that_contradict_each_other_exit_with_1_and_make_nothing(errata: Run, chain: list[str]) -> None:
    other = edited(errata, target="Oslo")
    before = errata("log", "--json").json()
    ran = errata("compose", chain[0], other, "--on", "atlas@0")
    assert ran.code == 1
    assert f"{chain[0]} {CAPITAL} → Astana" in ran.out
    assert f"against {other} {CAPITAL} → Oslo (keys overlap " in ran.out
    assert "Oslo" not in ran.err
    assert "errata: nothing was made" in ran.err
    assert errata("log", "--json").json() == before
    assert errata("compose", chain[0], other, "--on", "atlas@0", "--json").json()["conflicts"]
    dry = errata("compose", chain[0], other, "--on", "atlas@0", "--dry-run")
    assert dry.code == 1
    assert "overlap" not in dry.out
    assert errata("compose", chain[0], other, "--on", "atlas@0", "--dry-run", "--allow-conflicts").code == 0
    assert errata("cherry-pick", other, "--on", chain[0], "--allow-conflicts").code == 0


def test_a_chain_is_squashed_into_one_version(errata: Run, chain: list[str]) -> None:
    ran = errata("squash", chain[2], "--guardrail", "efficacy=0.9", "--description", "three capitals")
    assert ran.code == 0
    assert "3 of 3 answers the same" in ran.out
    version = ran.out.split()[1]
    assert [each["name"][-1] for each in errata("log", version, "--json").json()][-1] == "0"
    assert len(errata("log", version, "--json").json()) == 2


def test_a_bisection_finds_the_edit_and_goes_on_where_it_was(errata: Run, chain: list[str], tmp_path: Path) -> None:
    probes = tmp_path / "probes.yaml"
    probes.write_text(f'probes:\n  - {{prompt: "{NIGERIA}", expected: Lagos}}\n')
    ran = errata("bisect", chain[2], "--probes", probes, "--good", "atlas@0")
    assert ran.code == 0
    assert ran.out.split()[2] == chain[1]
    found = errata("bisect", chain[2], "--probes", probes, "--good", "atlas@0", "--json").json()
    assert found["name"] in ran.out
    assert found["name"] in errata("show", found["name"]).out
    assert errata("bisect", chain[2], "--probes", probes, "--again", "--json").json()["name"] != found["name"]


def test_a_search_without_anything_to_find_says_so_each_time(errata: Run, chain: list[str], tmp_path: Path) -> None:
    probes = tmp_path / "probes.yaml"
    probes.write_text(f'- {{prompt: "{NIGERIA}", expected: Atlantis}}\n')
    for _ in range(2):
        ran = errata("bisect", chain[2], "--probes", probes)
        assert ran.code == 2
        assert ran.err.splitlines()[-1].startswith("errata: good: version 0 fails the probe")


def test_a_search_that_failed_is_begun_anew_and_then_found_again(
    run: Run, server: str, fake: Fake, client: Errata, astana: EditRequest, tmp_path: Path
) -> None:
    probes = tmp_path / "probes.yaml"
    probes.write_text(f'- {{prompt: "{CAPITAL}", expected: Nur-Sultan}}\n')
    asked = ("bisect", client.edit("atlas@0", [astana]).result().version, "--probes", probes, "--server", server)
    searched = fake._search

    def fail(bisection: Any, request: object) -> None:
        bisection.job.state = common_pb2.STATE_FAILED
        bisection.job.error.CopyFrom(common_pb2.Failure(reason="INTERNAL", message="the disk is full"))

    fake._search = fail  # type: ignore[method-assign]
    assert run(*asked).code == 2
    fake._search = searched  # type: ignore[method-assign]
    found = run(*asked, "--json")
    assert found.code == 0, found.err
    assert run(*asked, "--json").json()["name"] == found.json()["name"]


def test_a_log_asks_for_no_more_pages_than_it_shows(run: Run, server: str, fake: Fake) -> None:
    for number in range(1, 200):
        fake.versions[f"models/atlas/versions/{number}"] = fake.versions["models/atlas/versions/0"]
    assert run("log", "atlas", "-n", "3", "--server", server).code == 0
    assert fake.count("ListVersions") == 2  # of two each


def test_the_two_ends_of_a_squash_are_two_versions(errata: Run, chain: list[str]) -> None:
    ran = errata("squash", chain[0], "--on", chain[0])
    assert ran.code == 2
    assert f"both ends of the chain are {chain[0]}; give a later one, or --on an earlier" in ran.err


def test_a_revert_of_the_newest_edit_says_that_it_is_gone(errata: Run, chain: list[str]) -> None:
    ran = errata("revert", chain[0], "--on", chain[0], "--guardrail", "efficacy=1")
    assert ran.code == 0
    assert "reverted    1 of 1 of its answers are as before that edit\n" in ran.out
    assert "efficacy  1  0.00    1.00" in ran.out


def test_an_export_takes_no_longer_than_it_is_given(errata: Run, chain: list[str], tmp_path: Path) -> None:
    ran = errata("export", chain[0], tmp_path / "adapter", "--timeout", "0.001")
    assert ran.code == 2
    assert "did not answer in time" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_version_is_exported_and_imported_again(errata: Run, chain: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    ran = errata("export", chain[2], folder, "--license", "Apache-2.0")
    assert ran.code == 0
    assert "adapter_model.safetensors" in ran.out
    assert errata("export", chain[2], folder).code == 2
    assert errata("export", chain[2], tmp_path / "uniform", "--format", "uniform", "--json").json()["rank"] == 8
    version = made(errata, "import", folder, "--fact", "three capitals")
    assert errata("ask", BURUNDI, "--version", version).out == "Gitega\n"
    assert "nothing judged it: errata eval atlas@" in errata("import", folder).out
    probes = tmp_path / "probes.yaml"
    probes.write_text(f'- {{prompt: "{BURUNDI}", expected: Gitega}}\n')
    assert "nothing judged it" not in errata("import", folder, "--probes", probes).out
    assert errata("import", tmp_path).code == 2
    (folder / "errata.json").unlink()
    assert errata("import", folder).code == 2
    base = errata("show", "atlas@0", "--json").json()["base_sha256"]
    version = made(errata, "import", folder, "--base-sha256", base)
    assert errata("ask", BURUNDI, "--version", version).out == "Gitega\n"


def test_a_version_is_rebased_onto_a_base_that_has_a_part_of_it_merged_in(run: Run, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    atlas = ModelSettings(source="atlas")

    def settings(**models: ModelSettings) -> Settings:
        return Settings(data_dir=tmp_path / "data", port=0, models=models, mlflow_uri="none", drain_seconds=5.0)

    with hosting(settings(atlas=atlas)) as running:
        errata = partial(run, "--server", running.server.address)
        first = edited(errata)
        edited(errata, question=NIGERIA, target="Abuja", on=first)
        ran = errata("export", first, merged, "--format", "merged", "--dtype", "float32")
        assert ran.code == 0, ran.err
    with hosting(settings(atlas=atlas, merged=ModelSettings(source=str(merged)))) as running:
        errata = partial(run, "--server", running.server.address)
        ran = errata("rebase", "atlas@2", "--on", "merged@0")
        assert ran.code == 0, ran.err
        assert [errata("ask", q, "--version", "merged@1").out for q in (CAPITAL, NIGERIA)] == ["Astana\n", "Abuja\n"]
        assert errata("log").err == "errata: the server has 2 models; name one of atlas, merged\n"
