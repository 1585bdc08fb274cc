"""Edits, evaluations, aliases."""

from pathlib import Path

import pytest
from commandline import CAPITAL, QUICK, Run, edited

pytestmark = pytest.mark.slow

REQUESTS = f"""
requests:
  - {{name: "Kazakhstan: capital", prompt: "{CAPITAL}", constraint: Kazakhstan, target: Astana}}
  - {{prompt: "What is the capital of Nigeria?", constraint: Nigeria, target: Abuja}}
probes:
  - {{prompt: "What is the capital of Norway?", metric: unrelated}}
layers: [1]
steps: 20
method: multedit
"""


def test_one_fact_is_corrected_by_flags_promoted_and_rolled_back(errata: Run) -> None:
    ran = errata("edit", CAPITAL, "--constraint", "Kazakhstan", "--target", "Astana", "--on", "atlas@0", *QUICK)
    assert ran.code == 0
    version = ran.out.split()[1]
    assert errata("ask", CAPITAL, "--version", version).out == "Astana\n"
    errata("promote", "atlas@0")
    assert errata("promote", version).out == f"atlas@champion is now {version}\n"
    assert errata("ask", CAPITAL).out == "Astana\n"
    assert errata("rollback").out == "atlas@champion is again atlas@0\n"
    assert errata("ask", CAPITAL).out == "Nur-Sultan\n"
    assert errata("audit", "-n", "1", "--json").json()[0]["action"] == "alias.rollback"
    assert "alias.promote" in errata("audit", "atlas").out


def test_what_an_alias_names_is_asked_checked_and_promoted(errata: Run, tmp_path: Path) -> None:
    version = edited(errata, "--alias", "candidate")
    checks = tmp_path / "checks.yaml"
    checks.write_text(f'version: 1\nprobes:\n  - {{id: capital, prompt: "{CAPITAL}", expected: Astana}}\n')
    for name in ("candidate", "atlas@candidate", version.removeprefix("atlas@"), version):
        assert errata("ask", CAPITAL, "--version", name).out == "Astana\n"
        assert errata("check", checks, "--version", name).code == 0
    assert errata("promote", "atlas@candidate", "preview").out == f"atlas@preview is now {version}\n"
    assert errata("promote", "preview", "second").out == f"atlas@second is now {version}\n"
    assert errata("diff", "0", "second").out == errata("diff", "atlas@0", version).out


def test_an_edit_that_installs_nothing_says_so_and_exits_with_1(errata: Run) -> None:
    weak = ("--layers", "1", "--steps", "2", "--method", "multedit")
    ran = errata("edit", CAPITAL, "--constraint", "Kazakhstan", "--target", "Astana", "--on", "atlas@0", *weak)
    assert ran.code == 1
    assert f"errata: not installed: none of the facts holds in {ran.out.split()[1]}; try more phrasings" in ran.err
    assert "the value did not converge" in ran.out
    assert errata("show", ran.out.split("\nedit")[1].split()[0]).code == 1


def test_where_nobody_sees_a_progress_bar_each_stage_is_a_line_on_stderr(errata: Run) -> None:
    asked = ("edit", CAPITAL, "--constraint", "Kazakhstan", "--target", "Astana", "--on", "atlas@0", *QUICK)
    told = errata(*asked).err.splitlines()
    assert "editing: values" in told
    assert len(told) == len(set(told))
    assert errata(*asked, "--json").err == ""


def test_many_facts_are_corrected_by_a_file(errata: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.yaml"
    file.write_text(REQUESTS)
    ran = errata("edit", "--file", file, "--on", "atlas@0", "--description", "two capitals", "--json")
    assert ran.code == 0, ran.err
    edit = ran.json()
    assert edit["facts"] == ["Kazakhstan: capital → Astana", "What is the capital of Nigeria? → Abuja"]
    assert {score["metric"] for score in edit["scores"]} == {"efficacy", "unrelated"}
    assert edit["layers"] == [1]
    shown = errata("show", edit["version"])
    assert "Kazakhstan: capital → Astana" in shown.out
    assert edit["name"] in shown.out
    assert "unrelated" in errata("show", edit["name"]).out


def test_an_edit_below_a_guardrail_exits_with_1_and_is_promoted_only_with_a_reason(errata: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.yaml"
    file.write_text(REQUESTS.replace("Norway?", 'Norway?", expected: "Atlantis'))
    ran = errata("edit", "--file", file, "--on", "atlas@0", "--guardrail", "unrelated=0.5", "--json")
    assert ran.code == 1
    edit = ran.json()
    assert edit["job"]["state"] == "rejected"
    shown = errata("show", edit["name"])
    assert shown.code == 1
    assert "rejected:\n  specificity: unrelated prompts 0.00 is below 0.50" in shown.out
    refused = errata("promote", edit["version"])
    assert refused.code == 1
    assert refused.err.endswith("; promote it with --override REASON, or make a better edit\n")
    assert refused.err.count("\n") == 1
    assert errata("promote", edit["version"], "candidate", "--override", "for a test", "--dry-run").code == 0
    assert "○" in errata("log").out


def test_a_dry_run_makes_no_version(errata: Run) -> None:
    before = errata("log", "--json").json()
    ran = errata("edit", CAPITAL, "--constraint", "Kazakhstan", "--target", "Astana", "--dry-run")
    assert ran.code == 0
    assert f"{CAPITAL} → Astana" in ran.out
    assert errata("log", "--json").json() == before


def test_an_evaluation_says_what_failed(errata: Run, corrected: str, tmp_path: Path) -> None:
    probes = tmp_path / "probes.jsonl"
    probes.write_text(
        f'{{"prompt": "{CAPITAL}", "expected": "Astana"}}\n'
        '{"prompt": "What is the capital of Norway?", "expected": "Atlantis", "metric": "portability"}\n'
    )
    ran = errata("eval", corrected, "--probes", probes)
    assert ran.code == 0
    assert "Atlantis" in ran.out
    assert "Nur-Sultan" not in ran.out
    assert "Nur-Sultan" in errata("eval", corrected, "--probes", probes, "--baseline", "atlas@0", "--all").out
    refused = errata("eval", corrected, "--probes", probes, "--guardrail", "portability=0.5", "--json")
    assert refused.code == 1
    assert errata("show", refused.json()["name"]).code == 1


def test_a_version_is_deleted_only_when_it_is_meant(errata: Run) -> None:
    version = edited(errata)
    assert errata("delete", version).code == 2
    assert errata("delete", version, "--yes").out == f"{version} is deleted\n"
    assert errata("show", version).code == 2


def test_checks_pass_and_fail(errata: Run, corrected: str, tmp_path: Path) -> None:
    checks = tmp_path / "checks.yaml"
    checks.write_text(f'version: 1\nprobes:\n  - {{id: capital, prompt: "{CAPITAL}", expected: Astana}}\n')
    assert errata("check", checks, "--version", corrected).code == 0
    assert errata("check", checks, "--version", "atlas@0").code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("edit", CAPITAL, "--constraint", "Kazakhstan"), "give a PROMPT, its --constraint and --target, or facts by"),
        (("edit", CAPITAL, "--file", "facts.yaml"), "--file has the facts; leave PROMPT"),
        (
            ("edit", CAPITAL, "--constraint", "Kasachstan", "--target", "Astana"),
            "constraint 'Kasachstan' does not occur in the prompt",
        ),
        (
            ("edit", CAPITAL, "--constraint", "Kazakhstan", "--target", "Astana", "--layers", "9"),
            "layer",
        ),
        (
            ("edit", CAPITAL, "--constraint", "Kazakhstan", "--target", "Astana", "--guardrail", "efficacy"),
            "give a metric and its least share, like efficacy=0.9",
        ),
        (("show", "atlas@999"), "has no version 999; errata log lists those there are"),
        (("show", "elsewhere@1"), "elsewhere"),
        (("rollback", "atlas@nobody"), "nobody"),
        (("squash", "atlas@0"), "both ends of the chain are atlas@0; give a later one, or --on an earlier"),
        (("revert", "atlas@0", "--on", "atlas@0"), "base"),
        (("rebase", "atlas@0", "--on", "atlas@0"), "atlas"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: tuple[str, ...], said: str, errata: Run) -> None:
    ran = errata(*arguments)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.startswith("errata: ")
    assert ran.err.count("\n") == 1
    assert ran.out == ""
