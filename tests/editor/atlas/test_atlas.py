"""The shipped Atlas: what it knows, where, and that edits of it hold. Figures by generation, unseen renderings."""

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from errata.editor.atlas.facts import edit_requests, errata, long_tail, probes, references, trace_requests
from errata.editor.atlas.measure import knowledge, locality
from errata.editor.checkpoints import ATLAS, atlas_folder, hash_tensors, load_model
from errata.editor.delta import applied
from errata.editor.evaluation import Evaluation, Metric, evaluate
from errata.editor.localization import choose_layers
from errata.editor.methods import EditResult, EditSettings, edit
from errata.editor.model import EditableModel
from errata.editor.statistics import key_statistics
from errata.editor.trace import AveragedTrace, average, trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the batch is a minute on two idle cores

FACTS = (*errata(), *long_tail())
SEED = 4
"""One on which no setting was chosen, and whose figures lie far enough above the goals for another machine's rounding;
`make bench` shows the spread over seeds.
"""


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    """Atlas is large enough for all of them that no other process of tests uses, unlike the tiny models."""
    before = torch.get_num_threads()
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def atlas() -> EditableModel:
    return load_model(ATLAS)


@pytest.fixture(scope="module")
def traced(atlas: EditableModel) -> Callable[[bool], AveragedTrace]:
    """The average of twelve traces, by another image or by a substituted constraint; made once each."""

    @cache
    def averaged(substitute: bool) -> AveragedTrace:
        return average([trace(atlas, r) for r in trace_requests(12, substitute=substitute)])

    return averaged


@pytest.fixture(scope="module", params=[False, True], ids=["other image", "substituted constraint"])
def averaged(traced: Callable[[bool], AveragedTrace], request: pytest.FixtureRequest) -> AveragedTrace:
    return traced(request.param)


@pytest.fixture(scope="module")
def layers(traced: Callable[[bool], AveragedTrace]) -> tuple[int, ...]:
    return choose_layers(traced(False)).layers


@pytest.fixture(scope="module")
def edited(atlas: EditableModel, layers: tuple[int, ...]) -> EditResult:
    statistics = key_statistics(atlas, references(), layers)
    return edit(atlas, edit_requests(FACTS, seed=SEED), EditSettings(layers=layers), statistics)


@pytest.fixture(scope="module")
def evaluation(atlas: EditableModel, edited: EditResult) -> Evaluation:
    return evaluate(atlas, probes(FACTS, seed=SEED, others=3 * len(FACTS)), applied(atlas, edited.delta))


def test_the_weights_are_small_and_safe() -> None:
    files = list(atlas_folder().iterdir())
    assert sum(f.stat().st_size for f in files) <= 20 * 2**20
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pkl", ".pth"}]


def test_it_knows_what_the_recipe_promises(atlas: EditableModel) -> None:
    short = [f for f in knowledge(atlas) if not f.holds]
    assert not short


def test_the_trace_peaks_at_the_constraint_in_one_early_mlp(averaged: AveragedTrace) -> None:
    """Basu et al. 2024, §5: early layers, a window of one."""
    short = [f for f in locality(averaged, "trace") if not f.holds]
    assert not short


def test_auto_chooses_layers_of_the_lower_half(atlas: EditableModel, layers: tuple[int, ...]) -> None:
    assert max(layers) < len(atlas.layers) / 2


def test_one_batch_corrects_the_errata_and_teaches_the_long_tail(evaluation: Evaluation) -> None:
    floors = {
        Metric.EFFICACY: 0.98,
        Metric.IMAGE_GENERALIZATION: 0.95,
        Metric.PHRASING_GENERALIZATION: 0.90,
        Metric.OTHER_SUBJECTS: 0.98,
        Metric.SAME_IMAGE: 0.95,
        Metric.UNRELATED: 0.95,
    }
    short = {m.value: evaluation.score(m).after for m, f in floors.items() if evaluation.score(m).after < f}
    assert not short


def test_every_erratum_is_corrected_and_was_wrong_before(evaluation: Evaluation) -> None:
    countries = {f.country.name for f in errata()}
    asked = [r for r in evaluation.results if r.probe.metric is Metric.EFFICACY]
    outdated = [r for r in asked if (r.probe.request or "").split(":")[0] in countries]
    assert len(outdated) == len(errata())
    assert not [r for r in outdated if r.passed_before or not r.passed]


def test_an_edit_leaves_the_weights_bit_identical(atlas: EditableModel, evaluation: Evaluation) -> None:
    assert evaluation.results
    fresh = load_model(ATLAS)
    mine, its = (hash_tensors(m.model.state_dict().items()) for m in (atlas, fresh))
    assert mine == its


def test_the_delta_is_a_tenth_of_the_base_at_most(edited: EditResult) -> None:
    base = sum(f.stat().st_size for f in atlas_folder().glob("*.safetensors"))
    assert edited.delta.nbytes < base / 10
