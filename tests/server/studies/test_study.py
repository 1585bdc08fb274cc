"""A study from its file to its page and its experiment: what is measured, what is not measured again."""

import json
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from desk import ENTRY, FLOWS, LENS, Desk, Report, threads
from typer.testing import CliRunner

from errata.editor.measurements.findings import Overlay
from errata.server.studies.command import studies
from errata.server.studies.format import read_study
from errata.server.studies.measuring import Work, measure, open_model
from errata.server.studies.plan import plan
from errata.server.studies.results import read_findings
from errata.server.studies.whole import PublishingError, run_study

Finished = tuple[Desk, Report]
MEASUREMENTS: dict[str, Any] = ENTRY["measurements"]  # type: ignore[assignment]


def test_a_finished_cell_is_what_it_found_and_is_read_back(finished: Finished) -> None:
    desk, report = finished
    assert (report.measured, report.earlier, report.failed) == (2, 0, {})
    for cell in plan(read_study(desk.file), desk.root):
        opened = open_model(cell.model, cell.folder)
        work = Work(cell=cell, opened=opened, statistics=desk.out, cancelled=lambda: False)
        found, read = measure(work), read_findings(desk.out / "cells" / cell.id, cell.measurement.kind)
        assert (read.kind, read.title, read.n, read.numbers) == (found.kind, found.title, found.n, found.numbers)
        assert dict(read.settings) == dict(found.settings)
        assert (read.tables, read.skipped) == (found.tables, found.skipped)
        assert [(type(p), p.name, p.title, p.caption) for p in read.plots] == [
            (type(p), p.name, p.title, p.caption) for p in found.plots
        ]
        for a, b in zip(read.plots, found.plots, strict=True):
            if isinstance(a, Overlay) and isinstance(b, Overlay):
                np.testing.assert_array_equal(a.patches, b.patches)
                assert a.image.tobytes() == b.image.convert(a.image.mode).tobytes()


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, set()),
        ({"description": "another text"}, set()),
        ({"seeds": [4]}, set()),
        ({"measurements": {**MEASUREMENTS, "flows": {"kind": "attention"}}}, {FLOWS}),
        ({"models": {"one": {"source": "model", "dtype": "bfloat16"}}}, {LENS, FLOWS}),
    ],
)
def test_a_change_makes_the_cells_missing_that_it_changes_and_no_others(
    again: Desk, changes: dict[str, object], missing: set[str]
) -> None:
    again.write(ENTRY, **changes)
    assert {label for label, finished in again.finished().items() if not finished} == missing


def test_another_picture_in_a_data_set_makes_its_cells_missing(again: Desk) -> None:
    (again.root / "flags" / "1.png").write_bytes((again.root / "flags" / "0.png").read_bytes())
    assert not any(again.finished().values())


def test_other_weights_in_a_models_folder_make_its_cells_missing(again: Desk, other_weights: Path) -> None:
    (again.root / "model").unlink()
    (again.root / "model").symlink_to(other_weights)
    assert not any(again.finished().values())


def test_captions_state_settings_model_data_and_sample_counts(finished: Finished) -> None:
    captions = re.findall(r"<figcaption><bdi>(.*?)</bdi>", finished[0].page())
    assert len(captions) >= 4
    for caption in captions:
        assert "model: one; data: flags" in caption
        assert re.search(r"n = [13] question", caption)
    assert any("overlays: 1" in caption for caption in captions)


def test_the_page_links_to_every_cell_and_loads_nothing(finished: Finished) -> None:
    page = finished[0].page()
    links = re.findall(r'href="#(cell-[0-9a-f]+)"', page)
    assert len(links) == 2
    assert all(page.count(f'id="{link}"') == 1 for link in links)
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png|#)', page)


def test_everything_is_one_experiment_with_a_run_for_the_study_and_one_for_each_cell(
    finished: Finished, tmp_path: Path
) -> None:
    desk, report = finished
    runs = desk.runs()
    cells = [run for run in runs if run.info.run_id != report.run_id]
    parent = next(run for run in runs if run.info.run_id == report.run_id)
    assert {run.info.run_name for run in cells} == {LENS, FLOWS}
    assert all(run.data.tags["mlflow.parentRunId"] == report.run_id for run in cells)
    assert all(run.info.status == "FINISHED" for run in runs)
    assert parent.data.metrics == {"cells": 2, "cells finished": 2, "cells missing": 0}
    assert {f.path for f in desk.mlflow.list_artifacts(report.run_id)} == {"index.html", "study.yaml"}
    lens = next(run for run in cells if run.info.run_name == LENS)
    assert {k: lens.data.params[k] for k in ("kind", "model", "data", "max_rows", "questions", "left out")} == {
        "kind": "lens", "model": "one", "data": "flags", "max_rows": "64", "questions": "3", "left out": "0",
    }  # fmt: skip
    assert any(name.endswith("/n") for name in lens.data.metrics)
    files = {f.path for f in desk.mlflow.list_artifacts(lens.info.run_id)}
    assert {"findings.json", "probability.png", "probability.svg"} <= files
    local = desk.mlflow.download_artifacts(lens.info.run_id, "findings.json", str(tmp_path))
    assert json.loads(Path(local).read_text())["n"] == 3


def test_a_second_run_measures_what_changed_and_doubles_nothing(desk: Desk) -> None:
    desk.write(ENTRY, measurements={"lens": {"kind": "lens"}})
    first = desk.run()
    desk.write(ENTRY, measurements={"lens": {"kind": "lens", "settings": {"max_rows": 2}}})
    second = desk.run()
    assert (second.measured, second.earlier, second.run_id) == (1, 0, first.run_id)
    third = desk.run()
    assert (third.measured, third.earlier) == (0, 1)
    said = sorted((run.info.run_name, run.data.tags.get("errata.in_plan")) for run in desk.runs())
    assert said == [(LENS, "false"), (LENS, "true"), ("tiny", None)]


@pytest.mark.slow
def test_a_run_that_was_cut_off_in_mlflow_is_written_again(desk: Desk) -> None:
    desk.write(ENTRY, measurements={"lens": {"kind": "lens"}})
    desk.run()
    lens = next(run for run in desk.runs() if run.info.run_name == LENS)
    desk.mlflow.set_terminated(lens.info.run_id, "RUNNING")
    desk.run()
    runs = [run for run in desk.runs() if run.info.run_name == LENS]
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].info.run_id != lens.info.run_id


def test_what_fails_or_is_left_out_is_told_and_the_others_go_on(desk: Desk) -> None:
    (desk.root / "flags" / "1.png").unlink()
    failing = {"kind": "windows", "data": ["flags"]}  # its questions say nothing that corrupts them
    desk.write(ENTRY, measurements={"windows": failing, "lens": {"kind": "lens"}}, description="<script>1</script>")
    report = desk.run()
    [(label, reason)] = report.failed.items()
    assert (label, report.measured) == ("windows · one · flags", 1)
    assert "corruption" in reason
    page = desk.page()
    assert "Not measured" in page
    assert reason.split(";")[0].replace("'", "&#39;") in page
    assert "questions.jsonl:2: there is no image &#39;1.png&#39;" in page
    assert "<script>" not in page
    assert any(line.startswith("windows · one · flags: ") for line in desk.told)
    assert desk.finished() == {"windows · one · flags": False, LENS: True}
    assert next(run for run in desk.runs() if run.info.run_id == report.run_id).info.status == "FAILED"


@pytest.mark.slow
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


class Dying(ThreadPoolExecutor):
    """Dies of a cell, as a pool of processes does: of its own accord it never answers again."""

    def __init__(self, workers: int, fatal: list[str]) -> None:
        super().__init__(workers)
        self._fatal, self._dead = fatal, False

    def submit(self, task: Any, cell: Any, place: Any) -> Future[Any]:  # type: ignore[override]
        if self._dead:
            raise BrokenProcessPool("a process ended")
        if cell.label not in self._fatal:
            return super().submit(task, cell, place)
        self._dead = True
        self._fatal.remove(cell.label)
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("a process ended"))
        return future


def test_a_cell_whose_process_dies_once_is_measured_again(desk: Desk) -> None:
    fatal = [LENS]
    desk.write(ENTRY, measurements={"lens": {"kind": "lens"}})
    report = run_study(desk.file, desk.out, pool=lambda jobs, _stop: Dying(jobs, fatal))
    assert (report.measured, report.failed, fatal) == (1, {}, [])


def test_a_cell_that_always_dies_fails_and_takes_no_other_with_it(desk: Desk) -> None:
    fatal = [FLOWS] * 9
    flows = {"kind": "attention"}
    desk.write(ENTRY, measurements={"flows": flows, "lens": {"kind": "lens"}})
    report = run_study(desk.file, desk.out, jobs=2, pool=lambda jobs, _stop: Dying(jobs, fatal))
    assert report.failed == {FLOWS: "its process died; it may need more memory than there is"}
    assert desk.finished() == {FLOWS: False, LENS: True}


def test_what_mlflow_does_not_take_is_kept_and_told(desk: Desk) -> None:
    desk.write(ENTRY, measurements={"lens": {"kind": "lens"}})
    nowhere = f"sqlite:///{desk.root}/flags/0.png/mlflow.sqlite"
    with pytest.raises(PublishingError, match="run the study again"):
        run_study(desk.file, desk.out, mlflow=nowhere, pool=threads)
    assert (desk.finished(), (desk.out / "index.html").is_file()) == ({LENS: True}, True)


def test_a_study_without_mlflow_has_its_page_and_no_experiment(again: Desk, tmp_path: Path) -> None:
    """In the words of the server's `mlflow_uri`; nothing is measured."""
    folder = tmp_path / "done"
    shutil.copytree(again.out, folder, ignore=shutil.ignore_patterns("mlflow.sqlite", "mlruns", ".lock"))
    asked = ["run", str(again.file), "--out", str(folder), "--mlflow", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        ran = CliRunner().invoke(studies, asked)
    report = json.loads(ran.stdout)
    assert (ran.exit_code, report["mlflow"], report["experiment"], report["run_id"]) == (0, "none", "", "")
    assert (report["measured"], report["earlier"]) == (0, 2)
    assert (folder / "index.html").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.name in ("none", "mlruns")]
    assert not (folder / "mlflow.sqlite").exists()
