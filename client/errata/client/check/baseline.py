"""A baseline on file: what one version answered to every probe, and to which question exactly."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from errata.client.check.checks import Checks, Probe, Question
from errata.client.check.errors import CheckError, Problem
from errata.client.check.judging import Subject


class _AnswerEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    question_sha256: str
    answer: str


class _SubjectEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    base_sha256: str
    delta_sha256: str


class _BaselineEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    subject: _SubjectEntry
    answers: dict[str, _AnswerEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A file of answers. `answers` are by probe, each with its question's hash."""

    path: Path
    subject: Subject
    answers: Mapping[str, tuple[str, str]] = field(hash=False, repr=False)

    def answers_to(self, checks: Checks) -> dict[str, str]:
        """What it has of these probes, by id. Raises CheckError where an unchanged probe is missing or has changed."""
        problems, found = [], {}
        for probe in checks.probes:
            question, answer = self.answers.get(probe.id, ("", ""))
            if question and question == question_sha256(probe.question):
                found[probe.id] = answer
            elif probe.unchanged:
                problems.append(self._stale(checks, probe, changed=bool(question)))
        if problems:
            raise CheckError(problems)
        return found

    def _stale(self, checks: Checks, probe: Probe, *, changed: bool) -> Problem:
        what = "holds another question" if changed else "holds no answer"
        message = f"{self.path} {what} for {probe.id!r}; write it anew with --update"
        return Problem(message=message, path=checks.path, line=probe.line)


def read_baseline(path: Path) -> Baseline:
    """Reads a file that `write_baseline` wrote. Raises CheckError where it cannot."""
    try:
        entry = _BaselineEntry.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckError.of(f"the baseline cannot be read: {reason}; write one with --update", path=path) from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = f"this is no baseline ({first['msg']}); write one with --update"
        raise CheckError.of(message, path=path, field=where) from None
    answers = {name: (each.question_sha256, each.answer) for name, each in entry.answers.items()}
    return Baseline(path=path, subject=Subject(**entry.subject.model_dump()), answers=answers)


def write_baseline(path: Path, checks: Checks, subject: Subject, answers: Mapping[str, str]) -> None:
    """Writes the answers of a version to every probe. Raises CheckError where the file cannot be written."""
    entry = {
        "version": 1,
        "subject": asdict(subject),
        "answers": {
            p.id: {"question_sha256": question_sha256(p.question), "answer": answers[p.id]} for p in checks.probes
        },
    }
    write_whole(path, json.dumps(entry, ensure_ascii=False, indent=2) + "\n")


def question_sha256(question: Question) -> str:
    """Names a question by its text, its pictures' bytes and how it is asked."""
    digest = hashlib.sha256(json.dumps([question.prompt, question.raw, question.max_new_tokens]).encode())
    for image in question.images:
        digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises CheckError where it cannot be written."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            whole.write_text(text, encoding="utf-8")
            whole.replace(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckError.of(f"the file cannot be written: {reason}; check the folder", path=path) from None
