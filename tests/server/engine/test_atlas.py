"""On the real model: real edits, pictures and text, memory."""

from collections.abc import Callable

import pytest
import torch

from errata.editor.atlas.facts import edit_requests, errata, probes
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, LowRank, applied
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.mixed import MixedDeltas, version_factors
from errata.editor.model import EditableModel
from errata.editor.values import ValueSettings
from errata.server.engine import Engine, Generation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def atlas() -> EditableModel:
    return load_model(ATLAS)


@pytest.fixture(scope="module")
def edits(atlas: EditableModel) -> list[Delta]:
    """Three real edits, made quickly: few contexts, few steps."""
    facts = errata()[:3]
    settings = EditSettings(layers=(1,), method=Method.MULTEDIT, values=ValueSettings(steps=10))
    return [edit(atlas, edit_requests([f], contexts=4, preserve=0), settings).delta for f in facts]


def test_a_mixed_batch_answers_like_each_version_alone(
    atlas: EditableModel, edits: list[Delta], start_engine: Callable[..., Engine]
) -> None:
    one, two, three = edits
    lineages: dict[int, list[Delta]] = {0: [], 1: [one], 2: [one, two], 3: [three], 4: [one, two, three]}
    prompts = [p.prompt for p in probes(errata()[:3], per_fact=1, others=4)][:14]
    expected = {}
    for version, lineage in lineages.items():
        with applied(atlas, *lineage):
            expected[version] = [a.text for a in atlas.generate(prompts)]
    engine = start_engine(atlas, lineages, max_rows=16)
    handles = {
        v: [engine.generate(Generation(version=v, prompt=p, max_new_tokens=16)) for p in prompts] for v in lineages
    }
    assert {v: [h.result(120).text for h in hs] for v, hs in handles.items()} == expected
    assert len({tuple(answers) for answers in expected.values()}) == len(lineages)
    assert any(p.images for p in prompts)
    assert not all(p.images for p in prompts)


def test_a_mixed_batch_has_the_logits_of_each_version_alone(atlas: EditableModel, edits: list[Delta]) -> None:
    prompt = next(p.prompt for p in probes(errata()[:1]) if p.prompt.images)
    lineages = [[], edits, edits[:1], edits[1:], edits[:1]]
    batch = atlas.inputs([atlas.encode(prompt)] * len(lineages))
    with MixedDeltas(atlas) as deltas, torch.inference_mode():
        with deltas.answering(deltas.stacked([version_factors(atlas, lineage) for lineage in lineages])):
            found = atlas.model(**batch).logits
        for row, lineage in zip(found, lineages, strict=True):
            with applied(atlas, *lineage):
                alone = atlas.model(**atlas.inputs([atlas.encode(prompt)])).logits[0]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-4)


def test_fifty_versions_add_less_than_a_tenth_of_the_base(
    atlas: EditableModel, start_engine: Callable[..., Engine]
) -> None:
    def version(seed: int) -> list[Delta]:
        random = torch.Generator().manual_seed(seed)
        low = LowRank(a=torch.randn(8, 768, generator=random) * 0.05, b=torch.randn(192, 8, generator=random) * 0.05)
        name = atlas.down_projection_name(1)
        return [Delta(base_sha256=atlas.base_sha256, layers={1: low}, modules={1: name})]

    lineages = {v: version(v) for v in range(1, 51)}
    engine = start_engine(atlas, lineages)
    prompt = probes(errata()[:1])[0].prompt
    handles = [engine.generate(Generation(version=v, prompt=prompt, max_new_tokens=2)) for v in lineages]
    for handle in handles:
        handle.result(120)
    base = sum(p.nbytes for p in atlas.model.parameters())
    assert sorted(engine.loaded_versions) == sorted(lineages)
    assert engine.versions_memory_bytes == 50 * 8 * (768 + 192) * 4
    assert engine.versions_memory_bytes < 0.1 * base
