"""Resource names, parsed strictly: what passes here has no separator, dot-dot or escape left in any part.

Knows nothing of what exists. A part may therefore name a folder or an MLflow model, but is never joined unparsed.
"""

import re
from dataclasses import dataclass
from typing import NoReturn

from errata.server.errors import MalformedError
from errata.server.ledger.rows import JobKind

CHAMPION = "champion"
"""The alias that a model's own name stands for."""

# ASCII classes and fullmatch: `\d` and `\w` would let look-alikes pass, `$` a closing newline.
_MODEL = r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,63}"
_ALIAS = r"[a-z0-9-]{1,64}"
_NUMBER = r"0|[1-9][0-9]{0,8}"  # fits 32 bits; one spelling a version
_ID = r"[a-z0-9][a-z0-9-]{0,63}"
_COLLECTIONS = {kind: f"{kind.value}s" for kind in JobKind}

_MODEL_PART = re.compile(_MODEL)
_ALIAS_PART = re.compile(_ALIAS)
_MODEL_NAME = re.compile(rf"models/({_MODEL})")
_VERSION_NAME = re.compile(rf"models/({_MODEL})/versions/({_NUMBER})")
_ALIAS_NAME = re.compile(rf"models/({_MODEL})/aliases/({_ALIAS})")
_JOB_NAMES = {kind: re.compile(rf"models/({_MODEL})/{plural}/({_ID})") for kind, plural in _COLLECTIONS.items()}
_MLFLOWS_OWN = re.compile(r"latest|v[0-9]+")

_MODEL_FORM = '1-64 of a-z, 0-9, "-", "_" and ".", a letter or digit first and no ".."'
_ALIAS_FORM = '1-64 of a-z, 0-9 and "-"'


@dataclass(frozen=True, slots=True)
class VersionRef:
    """A version by number or by alias: one of them is None."""

    model: str
    number: int | None
    alias: str | None

    @property
    def name(self) -> str:
        """Its full name."""
        if self.number is not None:
            return version_name(self.model, self.number)
        return alias_name(self.model, self.alias or CHAMPION)


def model_of(name: str, field: str) -> str:
    """The model of `models/{model}`. Raises MalformedError, as all of these do."""
    if found := _MODEL_NAME.fullmatch(name):
        return found[1]
    _refuse(name, field, f"models/{{model}}, the model {_MODEL_FORM}")


def version_ref(name: str, field: str) -> VersionRef:
    """The version that a name means: by number, by alias, or the model's champion for a model's own name."""
    if found := _VERSION_NAME.fullmatch(name):
        return VersionRef(found[1], int(found[2]), None)
    if found := _ALIAS_NAME.fullmatch(name):
        return VersionRef(found[1], None, alias_part(found[2], field))
    if found := _MODEL_NAME.fullmatch(name):
        return VersionRef(found[1], None, CHAMPION)
    _refuse(name, field, "models/{model}/versions/{number}, models/{model}/aliases/{alias} or models/{model}")


def version_of(name: str, field: str) -> tuple[str, int]:
    """The model and number of `models/{model}/versions/{number}`, where no alias will do."""
    if found := _VERSION_NAME.fullmatch(name):
        return found[1], int(found[2])
    _refuse(name, field, "models/{model}/versions/{number}, a number of at most 9 digits")


def alias_of(name: str, field: str) -> tuple[str, str]:
    """The model and alias of `models/{model}/aliases/{alias}`."""
    if found := _ALIAS_NAME.fullmatch(name):
        return found[1], alias_part(found[2], field)
    _refuse(name, field, f"models/{{model}}/aliases/{{alias}}, the alias {_ALIAS_FORM}")


def job_of(name: str, kind: JobKind, field: str) -> tuple[str, str]:
    """The model and id of a job's name."""
    if found := _JOB_NAMES[kind].fullmatch(name):
        return found[1], found[2]
    _refuse(name, field, f"models/{{model}}/{_COLLECTIONS[kind]}/{{{kind.value}}}, as the server gave it")


def model_part(model: str, field: str) -> str:
    """A model's own part of its name, checked."""
    if _MODEL_PART.fullmatch(model):
        return model
    _refuse(model, field, f"a model's name: {_MODEL_FORM}")


def alias_part(alias: str, field: str) -> str:
    """An alias without its prefix, checked. MLflow keeps `latest` and `v1`, `v2`, … for itself."""
    if _ALIAS_PART.fullmatch(alias) and not _MLFLOWS_OWN.fullmatch(alias):
        return alias
    _refuse(alias, field, f'an alias: {_ALIAS_FORM}, but not "latest" nor "v" and a number')


def model_name(model: str) -> str:
    """`models/{model}`."""
    return f"models/{model}"


def version_name(model: str, number: int) -> str:
    """`models/{model}/versions/{number}`."""
    return f"models/{model}/versions/{number}"


def alias_name(model: str, alias: str) -> str:
    """`models/{model}/aliases/{alias}`."""
    return f"models/{model}/aliases/{alias}"


def job_name(kind: JobKind, model: str, id: str) -> str:
    """`models/{model}/traces/{id}`, `…/edits/{id}`, and so on by the kind."""
    return f"models/{model}/{_COLLECTIONS[kind]}/{id}"


def _refuse(given: str, field: str, form: str) -> NoReturn:
    if not given:
        raise MalformedError(f"{field} is empty; give {form}", field=field, reason="MALFORMED_NAME")
    # In ASCII, so that a look-alike shows itself.
    shown = ascii(given if len(given) <= 100 else given[:100] + "...")
    raise MalformedError(f"{field} is {shown}; give {form}", field=field, reason="MALFORMED_NAME")
