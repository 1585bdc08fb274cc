"""Every kind of measurement, from the ordinary client through a whole server with Atlas to its run in MLflow."""

import io
import json
import logging
import queue
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import SECONDS, Hosted, hosting
from PIL import Image

from errata import client as api
from errata.client.findings import Measurement
from errata.client.measurements import KINDS, MeasuredQuestion, MeasurementSettings
from errata.editor.atlas.measured import multi_questions, single_questions, textual_questions
from errata.editor.checkpoints import load_model
from errata.editor.measurements import attention, constraints, failure, knockout, lens, noise, readout, sweep, windows
from errata.editor.measurements.findings import Findings
from errata.editor.measurements.questions import Question
from errata.editor.measurements.swept import SweepSettings
from errata.editor.methods import Method
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component
from errata.editor.trace import OtherImage, Substitution
from errata.server.jobs.auto import trace_edit
from errata.server.jobs.edits import own_probes
from errata.server.settings import ModelSettings, Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of its own code when it is imported
    import errata.server.registry.registry  # noqa: F401  (quiets MLflow, and imports it)

from mlflow import MlflowClient  # isort: skip

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FLAGS, WORDS, CLAIMS = single_questions(2), textual_questions(2), multi_questions(2)
ASTANA = ("Kazakhstan: capital", "What is the capital of Kazakhstan?", "Kazakhstan", "Astana")
GITEGA = ("Burundi: capital", "What is the capital of Burundi?", "Burundi", "Gitega")
OSLO = ("Norway: capital", "What is the capital of Norway?", "Norway", "Oslo")
"""Name, prompt, constraint and target of what a sweep edits; the last one is answered so already."""

Call = Callable[[EditableModel, Sequence[Question]], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind as it is asked for, and the editor's own function with the same settings. `checked`: by the answer."""

    settings: MeasurementSettings
    questions: Sequence[Question]
    direct: Call
    checked: bool = True


MLP = (Component.MLP,)
CASES = {
    "noise": Case(
        settings=api.NoiseSettings(noise=5, draws=2, components=["mlp"], grids=1),
        questions=WORDS,
        direct=lambda model, asked: noise.measure_noise(
            model, asked, noise.NoiseSettings(noise=5.0, draws=2, components=MLP, grids=1)
        ),
    ),
    "constraints": Case(
        settings=api.ConstraintSettings(components=["mlp"], min_total_effect=0),
        questions=CLAIMS,
        direct=lambda model, asked: constraints.measure_constraints(
            model, asked, constraints.ConstraintSettings(components=MLP, min_total_effect=0.0)
        ),
    ),
    "windows": Case(
        settings=api.WindowSettings(windows=[1, 2], components=["mlp"]),
        questions=[*FLAGS, *WORDS],
        direct=lambda model, asked: windows.measure_windows(
            model, asked, windows.WindowSettings(windows=(1, 2), components=MLP)
        ),
    ),
    "attention": Case(
        settings=api.AttentionSettings(overlays=1, tokens=2),
        questions=FLAGS,
        direct=lambda model, asked: attention.measure_attention(
            model, asked, attention.AttentionSettings(overlays=1, tokens=2)
        ),
    ),
    "failure": Case(
        settings=api.FailureSettings(draws=20),
        questions=[*FLAGS, replace(FLAGS[0], answer="Atlantis")],
        direct=lambda model, asked: failure.measure_failure(model, asked, failure.FailureSettings(draws=20)),
        checked=False,
    ),
    "knockout": Case(
        settings=api.KnockoutSettings(pairs=["image->constraint", "constraint->last"], window=1),
        questions=FLAGS,
        direct=lambda model, asked: knockout.measure_knockout(
            model,
            asked,
            knockout.KnockoutSettings(pairs=("image->constraint", "constraint->last"), window=1),
        ),
    ),
    "lens": Case(
        settings=api.LensSettings(max_rows=4),
        questions=FLAGS,
        direct=lambda model, asked: lens.measure_lens(model, asked, lens.LensSettings(max_rows=4)),
    ),
    "readout": Case(
        settings=api.ReadoutSettings(layers=[0, 1], neurons=2),
        questions=FLAGS,
        direct=lambda model, asked: readout.measure_readout(
            model, asked, readout.ReadoutSettings(layers=(0, 1), neurons=2)
        ),
        checked=False,
    ),
    "sweep": Case(
        settings=api.SweepSettings(layers=[1, 3, 5], method="multedit", steps=8),
        questions=(),
        direct=lambda model, _: swept(model),
    ),
}
"""Every kind, as small as it says something."""


def swept(model: EditableModel) -> Any:
    """The sweep by the editor's own functions."""
    facts = [
        EditRequest(
            name=name,
            target=target,
            contexts=(Context(prompt=Prompt(text=text), constraint=Constraint(text=constraint)),),
        )
        for name, text, constraint, target in (ASTANA, GITEGA, OSLO)
    ]
    requests = [sweep.SweepRequest(request=r, probes=own_probes([r])) for r in facts]
    settings = SweepSettings(layers=(1, 3, 5), method=Method.MULTEDIT, steps=8)
    trace = trace_edit(model, facts, (), progress=lambda *_: None, cancelled=lambda: False)
    return sweep.measure_sweep(model, requests, settings, trace=trace)


def asked(question: Question) -> MeasuredQuestion:
    """A question as a caller asks it."""
    corruptions = [
        c.word if isinstance(c, Substitution) else api.OtherImages([png(i) for i in c.images])
        for c in question.corruptions
        if isinstance(c, (Substitution, OtherImage))
    ]
    return MeasuredQuestion(
        api.Prompt(question.prompt.text, [png(i) for i in question.prompt.images]),
        [c.text for c in question.constraints],
        corruptions=corruptions,
        answer=question.answer,
    )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class House:
    """A server, the ordinary client, and what the server's log says of MLflow."""

    hosted: Hosted
    client: api.Errata
    mlflow: MlflowClient
    told: "queue.SimpleQueue[logging.LogRecord]"

    def measure(self, kind: str, questions: Sequence[Question], request_id: str) -> Measurement:
        facts = [
            api.EditRequest(name=name, contexts=[api.Context(text, constraint)], target=target)
            for name, text, constraint, target in (ASTANA, GITEGA, OSLO)
        ]
        options: Any = {"requests": facts} if kind == "sweep" else {}
        operation = self.client.measure(
            "atlas@0", CASES[kind].settings, list(map(asked, questions)), request_id=request_id, **options
        )
        return operation.result()

    def published(self, done: Measurement) -> Measurement:
        """The measurement, once the server says that it is in MLflow."""
        while not (seen := self.client.get_measurement(done)).mlflow_run_id:
            self.told.get(timeout=SECONDS)
        return seen

    def runs(self, done: Measurement) -> list[Any]:
        """Every run of a measurement, wherever it is."""
        experiments = [e.experiment_id for e in self.mlflow.search_experiments()]
        wanted = done.name.rpartition("/")[2]
        return list(self.mlflow.search_runs(experiments, f"tags.`errata.measurement` = '{wanted}'"))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    data = tmp_path_factory.mktemp("data")
    settings = Settings(
        data_dir=data, port=0, models={"atlas": ModelSettings(source="atlas")}, requests_per_minute=1_000_000
    )
    told: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    log, handler = logging.getLogger("errata.server.registry.outbox"), QueueHandler(told)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        with hosting(settings) as hosted, api.Errata(hosted.loaded().server.address) as client:
            yield House(hosted=hosted, client=client, mlflow=MlflowClient(f"sqlite:///{data}/mlflow.sqlite"), told=told)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.fixture(scope="module")
def atlas() -> EditableModel:
    return load_model("atlas")


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_a_kind_is_measured_over_grpc_as_the_editor_measures_it_and_is_a_run_in_mlflow(
    house: House, atlas: EditableModel, kind: str, tmp_path: Path
) -> None:
    case = CASES[kind]
    wrong = [replace(case.questions[0], answer="Atlantis")] if case.checked and case.questions else []
    questions = [*case.questions, *wrong]
    direct: Findings = case.direct(atlas, questions).findings()
    done = house.published(house.measure(kind, questions, f"once-{kind}"))

    found = done.findings
    assert found is not None
    told = {n.name: (n.value, n.low, n.high, n.n) for n in found.numbers}
    assert told == {n.name: pytest.approx((n.value, n.low, n.high, n.n), nan_ok=True) for n in direct.numbers}
    assert (found.n, found.settings, found.skipped) == (direct.n, direct.settings, direct.skipped)
    assert [t.rows for t in found.tables] == [t.rows for t in direct.tables]

    [run] = house.runs(done)
    assert (run.info.run_id, run.info.status) == (done.mlflow_run_id, "FINISHED")
    assert house.mlflow.get_experiment(run.info.experiment_id).name == "errata/atlas"
    values = [v for name, v in run.data.metrics.items() if name.rpartition("/")[2] not in ("low", "high", "n")]
    assert sorted(values) == pytest.approx(sorted(n.value for n in direct.numbers if n.value == n.value))
    assert run.data.params["kind"] == kind
    assert run.data.params["left out"] == str(len(direct.skipped))
    assert {n: v for n, v in run.data.params.items() if n in direct.settings} == dict(direct.settings)
    for line in direct.skipped:
        assert line.partition(":")[0] in run.data.tags["mlflow.note.content"].replace("\\", "")

    folder = Path(house.mlflow.download_artifacts(done.mlflow_run_id, "", str(tmp_path)))
    assert {path.name for path in folder.iterdir()} == set(done.files)
    for plot in direct.plots:
        Image.open(folder / f"{plot.name}.png").verify()
        assert b"<svg" in (folder / f"{plot.name}.svg").read_bytes()
    written = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    assert {n["name"]: n.get("value", 0.0) for n in written["numbers"]} == {n.name: n.value for n in found.numbers}
    assert written.get("skipped", []) == list(direct.skipped)


@pytest.mark.parametrize("kind", ["lens", "sweep"])
def test_what_cannot_be_measured_is_left_out_and_listed_with_its_reason(house: House, kind: str) -> None:
    case = CASES[kind]
    wrong = [replace(case.questions[0], answer="Atlantis")] if case.questions else []
    done = house.published(house.measure(kind, [*case.questions, *wrong], f"once-{kind}"))
    assert done.findings is not None
    [line] = done.findings.skipped
    assert line.startswith(("questions[2]: ", "requests[2]: "))
    assert "answer" in line
    [run] = house.runs(done)
    assert run.data.params["left out"] == "1"


def test_the_same_request_id_makes_no_measurement_and_no_run_twice(house: House) -> None:
    first = house.published(house.measure("lens", FLAGS, "twice"))
    again = house.published(house.measure("lens", FLAGS, "twice"))
    assert again == first
    assert len(house.runs(first)) == 1
    assert sum(each.name == first.name for each in house.client.measurements("atlas")) == 1
    other = house.measure("lens", FLAGS, "another")
    assert other.name != first.name
