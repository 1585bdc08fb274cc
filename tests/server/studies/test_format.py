"""What a study's file may say, and where it is said what is wrong with it."""

from pathlib import Path

import pytest
from desk import ENTRY, Desk

from errata.editor.errors import ErrataError
from errata.editor.measurements.noise import NoiseSettings
from errata.editor.states import Component
from errata.server.studies.format import read_study, settings_of
from errata.server.studies.plan import plan
from errata.server.studies.source import StudyError

EXAMPLE = Path(__file__).parents[3] / "examples" / "studies" / "atlas.yaml"


def refused(desk: Desk, text: str) -> list[str]:
    desk.write(text)
    with pytest.raises(StudyError) as caught:
        read_study(desk.file)
    return str(caught.value).splitlines()


def test_the_example_measures_every_kind_once() -> None:
    study = read_study(EXAMPLE)
    kinds = "attention constraints failure knockout lens noise readout sweep windows"
    assert sorted(entry.kind for entry in study.measurements.values()) == kinds.split()
    assert len(plan(study, EXAMPLE.parent)) == 9


def test_every_problem_is_told_with_file_line_and_field(desk: Desk) -> None:
    told = refused(
        desk,
        """
study: tiny
data:
  flags: {path: flags}
  both: {join: [flags, flag]}
measurements:
  lens: {kind: lense}
  trace: {kind: noise, data: [words], settings: {draws: 0}}
  grid: {kind: noise, settings: {nois: 3}}
  parts:
    kind: noise
    settings: {components: [mpl], draws: many}
  lens2: {kind: lens, edit: {layers: [1]}}
""",
    )
    assert told[:5] == [
        "study.yaml:5: data.both.join[1]: there is no data 'flag'; did you mean 'flags'?",
        "study.yaml:7: measurements.lens.kind: there is no measurement 'lense'; did you mean 'lens'?",
        "study.yaml:8: measurements.trace.data[0]: there is no data 'words'; known: flags, both",
        "study.yaml:8: measurements.trace.settings.draws: draws is 0; give at least 1",
        "study.yaml:9: measurements.grid.settings.nois: there is no setting 'nois'; did you mean 'noise'?",
    ]
    assert told[5].startswith("study.yaml:12: measurements.parts.settings.draws: it should be a valid integer")
    assert (
        told[6]
        == "study.yaml:12: measurements.parts.settings.components[0]: it should be 'mlp', 'attention' or 'layer'"
    )
    assert told[7].startswith("study.yaml:13: measurements.lens2.edit: only a readout edits first")


def test_files_and_names_are_looked_for_although_fields_are_wrong_as_well(desk: Desk) -> None:
    told = refused(
        desk,
        """
study: tiny
models: {one: {source: model, adapter: gone}, two: {sorce: model}}
data:
  flags: {path: none}
  csv: {path: a.csv}
measurements:
  lens: {knd: lens}
  trace: {kind: noise, models: [two, three], data: [csv, words], settings: {draws: 0}}
""",
    )
    assert told == [
        "study.yaml:3: models.two.sorce: there is no field 'sorce'; did you mean 'source'?",
        "study.yaml:3: models.one.adapter: there is no 'gone' beside the study's file; check the path",
        "study.yaml:5: data.flags.path: there is no 'none' beside the study's file; check the path",
        "study.yaml:6: data.csv: a CSV of VQA-Constraints holds no images; give their folder as images",
        "study.yaml:8: measurements.lens.kind: it is missing; give it",
        "study.yaml:8: measurements.lens.knd: there is no field 'knd'; did you mean 'kind'?",
        "study.yaml:9: measurements.trace.models[1]: there is no model 'three'; known: one, two",
        "study.yaml:9: measurements.trace.data[1]: there is no data 'words'; known: flags, csv",
        "study.yaml:9: measurements.trace.settings.draws: draws is 0; give at least 1",
    ]


def test_models_and_data_that_cannot_be_read_are_told_together(desk: Desk) -> None:
    desk.write(ENTRY, models={"one": {"source": "nowhere"}, "two": {"source": "flags"}})
    (desk.root / "flags" / "questions.jsonl").write_text("no JSON")
    with pytest.raises(ErrataError) as caught:
        plan(read_study(desk.file), desk.root)
    one, two, data = str(caught.value).splitlines()
    assert one.startswith("models.one: 'nowhere' holds no model.safetensors")
    assert two.startswith("models.two: ")
    assert data.startswith("data.flags: questions.jsonl:1: it is no JSON")


@pytest.mark.parametrize(
    ("models", "data", "message"),
    [
        ("5", "{f: {path: flags}}", "models: "),
        ("atlas", "{f: {path: flags}}", "models: "),
        ("{m: {source: model}}", "{3: {path: flags}, f: {pth: flags}}", "data.f.pth: "),
    ],
)
def test_parts_that_are_no_entries_are_told_and_no_names_are_looked_for_in_them(
    desk: Desk, models: str, data: str, message: str
) -> None:
    text = f"study: a\nmodels: {models}\ndata: {data}\nmeasurements: {{l: {{kind: lens, models: [las], data: [g]}}}}\n"
    told = "\n".join(refused(desk, text))
    assert message in told
    assert "known: a, " not in told


@pytest.mark.parametrize("below", ["[{}]", "{{<<: [{}]}}"])
def test_a_file_of_a_few_lines_that_stands_for_billions_is_refused_at_once(desk: Desk, below: str) -> None:
    lines = ["a0: &a0 {x0: 0}"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} " + below.format(", ".join([f"*a{n - 1}"] * 9)))
    [told] = refused(desk, "\n".join(lines))
    assert "with all that its aliases (*) repeat it has" in told


def test_aliases_that_repeat_little_are_read(desk: Desk) -> None:
    desk.write("study: a\ndata: {f: &f {path: flags}, g: {<<: *f, n: 1}}\nmeasurements: {l: {kind: lens}}\n")
    assert read_study(desk.file).data["g"].path == "flags"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the file is empty"),
        ("study: [", 1, "this is no YAML"),
        ("study: a\nstudy: b\n", 2, "the key 'study' stands here twice"),
        ("study: a\nmeasurements: {l: {kind: lens}}\n", 1, "data: it is missing"),
        ("study: a\ndata: {f: {}}\nmeasurements: {l: {kind: lens}}\n", 2, "data.f: give one of atlas, path and join"),
        ("study: a\ndata: {f: {atlas: single}}\nmeasurements: {l: {kind: lens}}\n", 2, "as it is asked for; give n"),
        ("study: a\ndata: {f: {path: x.csv}}\nmeasurements: {l: {kind: lens}}\n", 2, "holds no images"),
        ("study: a\ndata: {f: {path: gone}}\nmeasurements: {l: {kind: lens}}\n", 2, "there is no 'gone' beside"),
        ("study: ../a\ndata: {f: {path: flags}}\nmeasurements: {l: {kind: lens}}\n", 1, "study:"),
        ("study: a\ndata: {f: {path: flags}}\nmeasurements:\n  l: {knd: lens}\n", 4, "did you mean 'kind'?"),
        ("study: a\nseeds: [-1]\ndata: {f: {path: flags}}\nmeasurements: {l: {kind: lens}}\n", 2, "seeds[0]"),
        (
            "study: a\nmodels: {m: {version: 'models:/atlas/1', source: atlas}}\n"
            "data: {f: {path: flags}}\nmeasurements: {l: {kind: lens}}\n",
            2,
            "give version alone",
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused(desk: Desk, text: str, line: int, message: str) -> None:
    told = "\n".join(refused(desk, text))
    assert f"study.yaml:{line}: " in told
    assert message in told


def test_a_setting_is_read_as_its_type_and_the_seed_is_the_studys_unless_it_is_given(desk: Desk) -> None:
    settings = {"draws": 3, "components": ["mlp"]}
    measurements = {"a": {"kind": "noise", "settings": settings}, "b": {"kind": "noise", "settings": {"seed": 9}}}
    study = read_study(desk.write(measurements=measurements))
    assert settings_of(study.measurements["a"], 7) == NoiseSettings(draws=3, components=(Component.MLP,), seed=7)
    assert settings_of(study.measurements["b"], 7) == NoiseSettings(seed=9)


def test_a_seed_that_changes_nothing_makes_no_cells(desk: Desk) -> None:
    data = {"all": {"path": "flags"}, "some": {"path": "flags", "n": 2}}
    desk.write(ENTRY, data=data, seeds=[0, 1], measurements={"lens": {"kind": "lens"}, "noise": {"kind": "noise"}})
    assert list(desk.finished()) == [
        "lens · one · all",
        "lens · one · some · seed 0",
        "lens · one · some · seed 1",
        "noise · one · all · seed 0",
        "noise · one · all · seed 1",
        "noise · one · some · seed 0",
        "noise · one · some · seed 1",
    ]


def test_a_measurement_may_name_its_own_models_data_and_seeds(desk: Desk) -> None:
    models = {"one": {"source": "model"}, "two": {"source": "model"}}
    data = {"all": {"path": "flags"}, "some": {"path": "flags", "n": 2}}
    lens = {"kind": "lens", "models": ["two"], "data": "some", "seeds": [5]}
    desk.write(ENTRY, models=models, data=data, measurements={"lens": lens})
    assert list(desk.finished()) == ["lens · two · some · seed 5"]
