"""Lines of other files of questions, as the entries of ours: of data sets (docs/datasets.md), and of known facts.

A line that is neither is given back as it is. Nothing is checked here: what is wrong stays wrong in the entry.
"""

from collections.abc import Mapping

_KNOWN = {"known_id", "template", "prediction", "relation_id", "subject", "attribute", "prompt"}
"""The fields of a fact as Meng et al. (2022) list them."""


def entry_of(line: object) -> object:
    """The entry of a question that a line has."""
    if not isinstance(line, Mapping):
        return line
    if "text" in line and "prompt" not in line:
        return _of_data_set(line)
    if {"subject", "attribute", "prompt"} <= set(line) <= _KNOWN:
        return _of_known(line["prompt"], line["subject"], line["attribute"])
    return line


def _of_known(prompt: object, subject: object, attribute: object) -> Mapping[str, object]:
    entry = {"prompt": prompt, "constraint": subject, "answer": attribute, "raw": True}
    # Where the subject is said twice the first time is meant: templates begin with it.
    twice = isinstance(prompt, str) and isinstance(subject, str) and prompt.count(subject) > 1
    return {**entry, "occurrence": 0} if twice else entry


def _of_data_set(line: Mapping[str, object]) -> Mapping[str, object]:
    names = {"text": "prompt", "images": "image"}
    entry = {names.get(key, key): value for key, value in line.items() if key not in ("id", "chat")}
    if "chat" in line:
        entry["raw"] = line["chat"] is False
    constraints = line.get("constraints")
    if not isinstance(constraints, list) or not all(isinstance(each, Mapping) for each in constraints):
        return entry
    # A visual constraint stands first; the sort leaves the others as they are.
    ordered = sorted(constraints, key=lambda each: each.get("kind") != "visual")
    entry["constraints"] = [_without(each, "substitute", "other_images") for each in ordered]
    wrong = [{name: each[key] for key, name in _CORRUPTIONS.items() if key in each} for each in ordered]
    if any(wrong):
        entry["corruptions"] = wrong
    return entry


_CORRUPTIONS = {"substitute": "substitute", "other_images": "other_image"}


def _without(given: Mapping[str, object], *names: str) -> dict[str, object]:
    return {key: value for key, value in given.items() if key not in names}
