"""A study from its file to its page and its experiment: what is measured, what is not measured again."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from desk import ENTRY, Desk, threads

from errata.editor.measurements.findings import Overlay
from errata.server.studies.format import read_study
from errata.server.studies.measuring import Work, measure, open_model
from errata.server.studies.plan import plan
from errata.server.studies.results import read_findings
from errata.server.studies.whole import planned, run_study

LENS, FLOWS = "lens · one · flags", "flows · one · flags"


def test_a_study_measures_every_cell_and_a_second_run_measures_none(desk: Desk) -> None:
    first = desk.run()
    assert (first.measured, first.earlier, first.failed) == (2, 0, {})
    before = desk.times()
    second = desk.run()
    assert (second.measured, second.earlier) == (0, 2)
    assert desk.times() == before


def test_what_is_stored_of_a_cell_is_what_it_found(desk: Desk) -> None:
    desk.run()
    study = read_study(desk.file)
    cells = {cell.label: cell for cell in plan(study, desk.root)}
    for cell in cells.values():
        opened = open_model(cell.model, cell.folder)
        work = Work(cell=cell, opened=opened, statistics=desk.out / "statistics", cancelled=lambda: False)
        found, read = measure(work), read_findings(desk.out / "cells" / cell.id, cell.measurement.kind)
        assert (read.kind, read.title, read.n, read.numbers) == (found.kind, found.title, found.n, found.numbers)
        assert dict(read.settings) == dict(found.settings)
        assert (read.tables, read.skipped) == (found.tables, found.skipped)
        for a, b in zip(read.plots, found.plots, strict=True):
            assert type(a) is type(b)
            assert (a.name, a.title) == (b.name, b.title)
            assert b.caption in a.caption or a.caption == b.caption
    overlays = [
        p for p in read_findings(desk.out / "cells" / cells[FLOWS].id, "attention").plots if isinstance(p, Overlay)
    ]
    assert overlays
    assert np.isfinite(overlays[0].patches).all()
    assert overlays[0].image.size[0] > 0


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"measurements": {**ENTRY["measurements"], "flows": {"kind": "attention"}}}, {FLOWS}),  # type: ignore[dict-item]
        ({"description": "another text"}, set()),
        ({"seeds": [4]}, set()),
        ({"models": {"one": {"source": "model", "dtype": "bfloat16"}}}, {LENS, FLOWS}),
    ],
)
def test_a_change_runs_the_cells_that_it_changes_and_no_others(
    desk: Desk, changes: dict[str, object], again: set[str]
) -> None:
    desk.run()
    desk.write(ENTRY, **changes)
    assert {label for label, finished in desk.finished().items() if not finished} == again


def test_another_picture_in_a_data_set_runs_its_cells_again(desk: Desk) -> None:
    desk.run()
    (desk.root / "flags" / "1.png").write_bytes((desk.root / "flags" / "0.png").read_bytes())
    assert not any(desk.finished().values())


def test_a_missing_picture_is_told_with_its_line(desk: Desk) -> None:
    (desk.root / "flags" / "1.png").unlink()
    desk.run()
    cell = next(cell for cell, _ in planned(desk.file, desk.out) if cell.label == LENS)
    found = read_findings(desk.out / "cells" / cell.id, "lens")
    assert found.n == 2
    assert found.skipped == ("questions.jsonl:2: there is no image '1.png'",)
    assert "there is no image" in desk.page()


def test_a_cell_that_fails_is_told_and_the_others_go_on(desk: Desk) -> None:
    failing = {"kind": "windows", "data": ["flags"]}  # its questions say nothing that corrupts them
    desk.write(ENTRY, measurements={"windows": failing, **ENTRY["measurements"]})  # type: ignore[dict-item]
    report = desk.run()
    [(label, reason)] = report.failed.items()
    assert (label, report.measured) == ("windows · one · flags", 2)
    assert "corruption" in reason
    assert "windows · one · flags" in desk.page()
    assert "Not measured" in desk.page()
    assert any(line.startswith("windows · one · flags: ") for line in desk.told)
    assert desk.finished() == {"windows · one · flags": False, LENS: True, FLOWS: True}


def test_ctrl_c_leaves_what_is_finished_and_the_next_run_goes_on(desk: Desk) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(LENS):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(desk.file, desk.out, told=interrupt, pool=threads)
    assert desk.finished() == {LENS: True, FLOWS: False}
    assert "it has not been run" in desk.page()
    report = desk.run()
    assert (report.measured, report.earlier) == (1, 1)


def test_captions_state_settings_model_data_and_sample_counts(desk: Desk) -> None:
    desk.run()
    captions = re.findall(r"<figcaption><bdi>(.*?)</bdi>", desk.page())
    assert len(captions) >= 4
    for caption in captions:
        assert "model: one; data: flags" in caption
        assert "3 question" in caption or "n = " in caption
    assert any("overlays: 1" in caption for caption in captions)


def test_the_page_links_to_every_cell_and_loads_nothing(desk: Desk) -> None:
    desk.run()
    page = desk.page()
    links = re.findall(r'href="#(cell-[0-9a-f]+)"', page)
    assert len(links) == 2
    assert all(page.count(f'id="{link}"') == 1 for link in links)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png|#)', page)


def test_what_a_study_says_of_itself_is_escaped(desk: Desk) -> None:
    desk.write(ENTRY, description="<script>alert(1)</script>")
    desk.run()
    assert "<script>" not in desk.page()


def test_everything_is_one_experiment_with_a_run_for_the_study_and_one_for_each_cell(desk: Desk) -> None:
    report = desk.run()
    experiment = desk.mlflow.get_experiment_by_name("errata/studies/tiny")
    runs = desk.mlflow.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.info.run_id == report.run_id)
    cells = [run for run in runs if run is not parent]
    assert {run.info.run_name for run in cells} == {LENS, FLOWS}
    assert all(run.data.tags["mlflow.parentRunId"] == report.run_id for run in cells)
    assert all(run.info.status == "FINISHED" for run in runs)
    assert parent.data.metrics == {"cells": 2, "cells finished": 2, "cells missing": 0}
    assert {f.path for f in desk.mlflow.list_artifacts(report.run_id)} == {"index.html", "study.yaml"}
    lens = next(run for run in cells if run.info.run_name == LENS)
    assert lens.data.params["model"] == "one"
    assert lens.data.params["max_rows"] == "64"
    assert lens.data.params["questions"] == "3"
    assert any(name.endswith("/n") for name in lens.data.metrics)
    files = {f.path for f in desk.mlflow.list_artifacts(lens.info.run_id)}
    assert {"findings.json", "probability.png", "probability.svg"} <= files
    local = desk.mlflow.download_artifacts(lens.info.run_id, "findings.json", str(desk.root))
    assert json.loads(Path(local).read_text())["n"] == 3


def test_publishing_again_doubles_no_run_and_marks_what_is_no_longer_in_the_study(desk: Desk) -> None:
    first = desk.run()
    desk.write(ENTRY, measurements={"lens": {"kind": "lens"}, "flows": {"kind": "attention"}})
    second = desk.run()
    assert first.run_id == second.run_id
    experiment = desk.mlflow.get_experiment_by_name("errata/studies/tiny")
    runs = desk.mlflow.search_runs([experiment.experiment_id])
    said = sorted((run.info.run_name, run.data.tags.get("errata.in_plan")) for run in runs)
    assert said == [(FLOWS, "false"), (FLOWS, "true"), (LENS, "true"), ("tiny", None)]
    desk.run()
    assert len(desk.mlflow.search_runs([experiment.experiment_id])) == 4


def test_a_run_that_was_cut_off_in_mlflow_is_written_again(desk: Desk) -> None:
    desk.run()
    client, experiment = desk.mlflow, desk.mlflow.get_experiment_by_name("errata/studies/tiny")
    lens = next(run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == LENS)
    client.set_terminated(lens.info.run_id, "RUNNING")
    desk.run()
    runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == LENS]
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].info.run_id != lens.info.run_id
