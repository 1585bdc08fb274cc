"""Edits on versions of hundreds of requests: all of them are held, and their pictures are decoded once."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from house import LAYER, House, Worker, context_message, edit_message, question, small_edit, succeeded
from PIL import Image
from planting import noise, plant

from errata.editor.atlas import facts, questions
from errata.editor.atlas.facts import ask
from errata.editor.earlier import Earlier
from errata.editor.errors import ImageError
from errata.editor.methods import edit
from errata.editor.requests import Context
from errata.server.conversion import Decoder
from errata.server.images import ImagePolicy
from errata.server.jobs.earlier import earlier_edits
from errata.server.jobs.lineages import Lineages
from errata.v1 import common_pb2, edit_pb2

MANY = 300


def asking(name: str, contexts: Sequence[Context]) -> edit_pb2.EditRequest:
    return edit_pb2.EditRequest(name=name, target="nowhere", contexts=[context_message(c) for c in contexts])


def held(house: House, version: int, decoder: Decoder | None = None) -> Earlier:
    folder = house.models.get("atlas").keys_folder
    return earlier_edits(Lineages(house.ledger), decoder or house.decoder, "atlas", version, folder)


def keys(house: House, earlier: Earlier) -> list[object]:
    with house.models.get("atlas").borrow() as model:
        return [k.tolist() for k in earlier.keys(model, LAYER, of_base=True)]


@pytest.fixture(scope="module")
def crowded(house: House) -> int:
    """A version of two edits with `MANY` requests in words about other countries than Croatia, and one about it."""
    countries = [c for c in facts.KNOWN if c.name != "Croatia"]
    phrasings = [p for some in questions.PHRASINGS.values() for p in some]
    asked = [(c, p) for p in phrasings for c in countries][:MANY]
    assert len(asked) == MANY
    number = 0
    for half in (slice(0, MANY // 2), slice(MANY // 2, None)):
        requests = [asking(f"{c.name}: {p.ask('it').text}", [ask(c, p, "", None)]) for c, p in asked[half]]
        if number == 0:
            requests.append(
                asking("Croatia", [ask(next(c for c in facts.KNOWN if c.name == "Croatia"), phrasings[0], "", None)])
            )
        message = edit_pb2.CreateEditRequest(parent=f"models/atlas/versions/{number}", requests=requests)
        number = plant(house, message, noise(house, number, 0.01), parent=number)
    return number


@pytest.mark.slow
def test_an_edit_holds_every_request_of_other_subjects_however_many_and_says_so(
    house: House, crowded: int, worker: Worker
) -> None:
    message = edit_message(small_edit("Croatia", contexts=2), method=edit_pb2.METHOD_MEMIT, steps=4)
    row = succeeded(worker.run(message, version=crowded))
    everything, order, loaded = held(house, crowded), house.decoder.edit(message), house.models.get("atlas")
    assert len(everything.requests) == MANY + 1
    assert f"holds {MANY} requests of earlier edits" in (house.artifacts.folder(row.id) / "report.html").read_text(
        encoding="utf-8"
    )
    with loaded.borrow() as model:
        settings = replace(order.settings, layers=(LAYER,))
        statistics, parent = loaded.statistics(model, (LAYER,)), loaded.composed(crowded)
        whole, newest = (
            edit(model, order.requests, settings, statistics, parent=parent, earlier=e).delta.sha256
            for e in (replace(everything, folder=None), replace(everything, requests=everything.requests[:256]))
        )
    assert row.made is not None
    assert house.ledger.version("atlas", row.made).delta_sha256 == whole != newest


def test_the_newest_request_comes_first(house: House, crowded: int) -> None:
    (first, second), parent = held(house, crowded).requests[:2], house.ledger.version("atlas", crowded).parent
    newest = Lineages(house.ledger).edits("atlas", crowded)[0].request.requests
    texts = [r.contexts()[0].prompt.text for r in (first, second)]
    assert texts == [r.contexts[0].prompt.text for r in newest[:2]]
    assert parent is not None
    assert held(house, parent).requests[0].name == held(house, crowded).requests[MANY // 2].name


@pytest.fixture(scope="module")
def shown(house: House) -> int:
    """A version of an edit with pictures, 20 contexts a request."""
    contexts = [question("Italy"), question("Japan"), question("Italy", shown=False), question("Japan", shown=False)]
    message = edit_pb2.CreateEditRequest(
        parent="models/atlas/versions/0", requests=[asking("one", contexts * 5), asking("two", contexts[:1])]
    )
    return plant(house, message, noise(house, 9, 0.01))


def test_pictures_are_decoded_where_keys_are_not_kept_and_not_again(house: House, shown: int) -> None:
    def fail(_image: common_pb2.Image, field: str) -> Image.Image:
        raise ImageError("opened", field=field)

    unopened = held(house, shown, Decoder(ImagePolicy(), fail))
    with pytest.raises(ImageError, match="opened"):
        keys(house, unopened)
    computed = keys(house, held(house, shown))
    assert keys(house, unopened) == computed
    assert [len(k[0]) for k in computed] == [7, 1]  # every third of 20 contexts stands for a request
    assert computed == keys(house, replace(held(house, shown), folder=None))


def test_a_request_is_of_all_subjects_of_its_contexts(house: House, shown: int) -> None:
    assert [r.subjects for r in held(house, shown).requests] == [{"Italy", "Japan"}, {"Italy"}]
