"""The history by both clients: what goes over the wire and what comes back."""

import asyncio
from pathlib import Path

import pytest
from fake_server import CAPITAL, Fake

from errata.client import (
    AsyncErrata,
    Context,
    DerivationKind,
    EditRequest,
    EditsConflictError,
    Errata,
    InvalidInputError,
    MessageTooLargeError,
    Metric,
    NothingToBisectError,
    Probe,
)


def _edit(client: Errata, target: str, parent: str = "atlas@0") -> str:
    request = EditRequest(name="Kazakhstan: capital", contexts=[Context(CAPITAL, "Kazakhstan")], target=target)
    return client.edit(parent, [request]).result().version


def test_a_revert_tells_of_later_edits_and_of_what_was_taken_away(client: Errata) -> None:
    version = _edit(client, "Astana")
    derivation = client.revert(version, version).result()
    assert (derivation.kind, derivation.sources) == (DerivationKind.REVERT, (version,))
    assert derivation.facts == ("revert Kazakhstan: capital → Astana",)
    assert derivation.later[0].scores[0].metric is Metric.EFFICACY
    assert derivation.reverted[0].after == "old"
    assert client.version(derivation.version).derivation == derivation.name
    assert client.generate(derivation.version, CAPITAL).text == "Nur-Sultan"


def test_conflicting_edits_raise_and_can_be_looked_at(client: Errata) -> None:
    versions = [_edit(client, "Astana"), _edit(client, "Almaty")]
    operation = client.compose("atlas@0", versions)
    with pytest.raises(EditsConflictError):
        operation.result()
    [conflict] = operation.latest.conflicts
    assert (conflict.first.version, conflict.second.fact) == (versions[0], "Kazakhstan: capital → Almaty")
    allowed = client.compose("atlas@0", versions, allow_conflicts=True).result()
    assert allowed.version
    assert len(client.compose("atlas@0", versions, validate_only=True).latest.conflicts) == 1


def test_one_version_to_compose_is_not_taken_for_its_letters(client: Errata, fake: Fake) -> None:
    version = _edit(client, "Astana")
    client.compose("atlas@0", version).result()
    [request] = [r for r in fake.requests if type(r).__name__ == "CreateDerivationRequest"]
    assert list(request.compose.versions) == [version]


def test_a_squash_says_how_equal_it_is(client: Errata, fake: Fake) -> None:
    derivation = client.squash("atlas@0", _edit(client, "Astana"), resolve=True).result()
    assert derivation.equality is not None
    assert derivation.equality.rank_after < derivation.equality.rank_before
    assert next(r for r in fake.requests if type(r).__name__ == "CreateDerivationRequest").squash.resolve


def test_an_adapter_folder_goes_over_the_wire_whole(client: Errata, fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    derivation = client.import_adapter("atlas@0", tmp_path, facts=["the euro"], base_sha256="ab" * 32).result()
    assert (derivation.kind, derivation.facts) == (DerivationKind.IMPORT, ("the euro",))
    sent = next(r for r in fake.requests if type(r).__name__ == "CreateDerivationRequest").adapter
    assert (sent.manifest, sent.adapter_config, sent.adapter_model) == (b"", b"{}", b"weights")
    assert sent.base_sha256 == "ab" * 32


def test_a_folder_that_holds_no_adapter_is_refused_before_anything_is_sent(
    client: Errata, fake: Fake, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match="no adapter folder") as error:
        client.import_adapter("atlas@0", tmp_path)
    assert error.value.field == "folder"
    assert fake.calls == []


def test_options_are_sent_with_every_kind(client: Errata, fake: Fake) -> None:
    version = _edit(client, "Astana")
    probe = Probe("unrelated", CAPITAL)
    client.rebase("atlas@0", version, probes=[probe], guardrails={"unrelated": 0.5}, description="why", request_id="a")
    sent = next(r for r in fake.requests if type(r).__name__ == "CreateDerivationRequest")
    assert (len(sent.probes), sent.guardrails[0].least, sent.description, sent.request_id) == (1, 0.5, "why", "a")
    assert sent.rebase.version == version


def test_a_search_ends_with_the_first_bad_version(client: Errata) -> None:
    first = _edit(client, "Astana")
    second = _edit(client, "Almaty", parent=first)
    bisection = client.bisect(second, [Probe("efficacy", CAPITAL, "Nur-Sultan")], good="atlas@0").result()
    assert (bisection.first_bad, bisection.facts) == (first, ("Kazakhstan: capital → Astana",))
    assert [(step.version, step.good) for step in bisection.steps] == [(first, False)]
    with pytest.raises(NothingToBisectError):
        client.bisect(second, [Probe("efficacy", "What is the capital of Norway?", "Oslo")]).result()
    assert [each.name for each in client.bisections("atlas")][-1] == bisection.name


def test_the_asynchronous_client_has_the_same_history(server: str, client: Errata) -> None:
    version = _edit(client, "Astana")

    async def use() -> None:
        async with AsyncErrata(server) as errata:
            derivation = await (await errata.revert(version, version)).result()
            assert await errata.get_derivation(derivation.name) == derivation
            assert [each.name async for each in errata.derivations("atlas")] == [derivation.name]
            assert (await errata.compare("atlas@0", version)).answers[0].changed
            bisection = await (await errata.bisect(version, [Probe("efficacy", CAPITAL, "Nur-Sultan")])).result()
            assert await errata.get_bisection(bisection.name) == bisection
            assert [each.name async for each in errata.bisections("atlas")] == [bisection.name]
            for begun in (
                errata.compose(version, [version], allow_conflicts=True),
                errata.squash("atlas@0", version),
                errata.rebase("atlas@0", version),
            ):
                assert (await (await begun).result()).version

    asyncio.run(use())


def test_an_adapter_that_is_larger_than_a_message_is_refused_before_it_is_read(tmp_path: Path, server: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.truncate(2**40)
    with Errata(server) as client, pytest.raises(MessageTooLargeError, match="of at most 67108864 is taken") as caught:
        client.import_adapter("atlas@0", tmp_path)
    assert caught.value.field == "folder"
