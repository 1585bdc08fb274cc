"""Who is asked: a version on a server, or one on this machine. Greedily, so that the same question has one answer."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from errata.client.check.checks import Probe, Question
from errata.client.check.errors import CheckError
from errata.client.check.judging import Subject
from errata.client.client import Errata
from errata.client.errors import InvalidInputError
from errata.client.inputs import Prompt
from errata.client.names import last_part, model_part, says_model

GROUP = "errata.answerers"
"""The entry points that open versions without a server: `OpenLocal`s."""

_AT_ONCE = 16
"""Calls at a time: enough to fill a server's batch, and a fraction of its queue."""
_BATCH = 32

Step = Callable[[], None]
"""Called once for each answer."""


class Answerer(Protocol):
    """One version that can be asked."""

    @property
    def subject(self) -> Subject:
        """Which version it is."""

    def answers(self, path: Path, probes: Sequence[Probe], step: Step) -> dict[str, str]:
        """The answers by the probes' ids. `path` is the probes' file. Raises CheckError where one cannot be had."""


class LocalVersion(Protocol):
    """A version on this machine, as a back end of the group `errata.answerers` gives it."""

    @property
    def name(self) -> str:
        """What it is called in reports."""

    @property
    def base_sha256(self) -> str:
        """Its base's hash."""

    @property
    def delta_sha256(self) -> str:
        """Its delta's hash; empty where it changes nothing."""

    def answers(
        self, questions: Sequence[tuple[str, Sequence[bytes]]], *, raw: bool, max_new_tokens: int
    ) -> Sequence[str]:
        """Greedy answers to prompts with encoded images. Raises ValueError, in one line, where one cannot be asked."""


OpenLocal = Callable[[str, str], LocalVersion]
"""Opens a target on a base. Raises ValueError, in one line that says what to do, where it cannot."""


class ServerAnswerer:
    """A version on a server, asked with many calls at once."""

    def __init__(self, client: Errata, version: str) -> None:
        # The number that an alias stands for now: it may move while probes are asked.
        found = client.version(version)
        self._client, self._version = client, found.name
        self.subject = Subject(
            name=f"{model_part(found.name)}@{last_part(found.name)}",
            base_sha256=found.base_sha256,
            delta_sha256=found.delta_sha256,
        )

    def ask(self, question: Question) -> str:
        """One answer. Raises ErrataError."""
        prompt = Prompt(question.prompt, list(question.images), raw=question.raw)
        return self._client.generate(
            self._version, prompt, temperature=0.0, max_new_tokens=question.max_new_tokens
        ).text

    def answers(self, path: Path, probes: Sequence[Probe], step: Step) -> dict[str, str]:
        """As `Answerer` has it. The first error ends it; what has not been sent by then is not."""

        def ask(probe: Probe) -> str:
            try:
                answer = self.ask(probe.question)
            except InvalidInputError as error:
                raise _unaskable(path, probe, str(error), error.reason) from error
            step()
            return answer

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="errata-check") as pool:
            waiting = [pool.submit(ask, probe) for probe in probes]
            try:
                return {probe.id: each.result() for probe, each in zip(probes, waiting, strict=True)}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class LocalAnswerer:
    """A version on this machine."""

    def __init__(self, version: LocalVersion) -> None:
        self._version = version
        self.subject = Subject(name=version.name, base_sha256=version.base_sha256, delta_sha256=version.delta_sha256)

    def answers(self, path: Path, probes: Sequence[Probe], step: Step) -> dict[str, str]:
        """As `Answerer` has it."""
        found: dict[str, str] = {}
        for batch in _batches(probes):
            try:
                found |= self._batch(batch)
            except ValueError:
                # One of them is at fault: asked alone, it says so.
                found |= {probe.id: self._alone(path, probe) for probe in batch}
            for _ in batch:
                step()
        return found

    def _batch(self, probes: Sequence[Probe]) -> dict[str, str]:
        questions = [(p.question.prompt, [image.read_bytes() for image in p.question.images]) for p in probes]
        first = probes[0].question
        answers = self._version.answers(questions, raw=first.raw, max_new_tokens=first.max_new_tokens)
        return {probe.id: answer for probe, answer in zip(probes, answers, strict=True)}

    def _alone(self, path: Path, probe: Probe) -> str:
        try:
            return self._batch([probe])[probe.id]
        except ValueError as error:
            raise _unaskable(path, probe, str(error)) from error


def version_name(model: str, ref: str) -> str:
    """A version by its number or alias, or by a name that says the model itself.

    >>> version_name("atlas", "3"), version_name("atlas", "atlas@champion")
    ('atlas@3', 'atlas@champion')
    """
    return ref if says_model(ref) else f"{model}@{ref}"


def local_opener() -> OpenLocal:
    """What opens versions on this machine. Raises CheckError where it is not installed."""
    remedy = "pip install 'errata[server]', or check against a server"
    for found in entry_points(group=GROUP):
        try:
            opener: Callable[[], OpenLocal] = found.load()
        except ModuleNotFoundError as error:
            raise CheckError.of(
                f"--local needs the model's own libraries ({error.name} is missing); {remedy}"
            ) from None
        return opener()
    raise CheckError.of(f"--local needs a back end, and none is installed (entry points {GROUP!r}); {remedy}")


def open_local(opener: OpenLocal, target: str, base: str) -> LocalAnswerer:
    """A version on this machine. Raises CheckError where it cannot be opened."""
    try:
        return LocalAnswerer(opener(target, base))
    except ValueError as error:
        raise CheckError.of(str(error)) from error


def _batches(probes: Sequence[Probe]) -> Iterator[Sequence[Probe]]:
    groups: dict[tuple[bool, int], list[Probe]] = {}
    for probe in probes:
        groups.setdefault((probe.question.raw, probe.question.max_new_tokens), []).append(probe)
    for group in groups.values():
        yield from (group[i : i + _BATCH] for i in range(0, len(group), _BATCH))


def _unaskable(path: Path, probe: Probe, message: str, reason: str = "") -> CheckError:
    return CheckError.of(f"{probe.id!r} cannot be asked: {message}", path=path, line=probe.line, reason=reason)
