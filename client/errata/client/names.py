"""Resource names, long and short. Knows nothing of what exists; the server checks what it is given.

Everywhere the client takes a name it takes the resource itself, its full name, or a short one:

    atlas              models/atlas                       the version `champion`, where a version is asked for
    atlas@3            models/atlas/versions/3
    atlas@champion     models/atlas/aliases/champion
"""

from typing import Protocol


class Named(Protocol):
    """A resource: a model, version, alias, trace, edit or evaluation."""

    @property
    def name(self) -> str:
        """Its full name."""


NameLike = str | Named
"""A resource, its full name, or a short one."""


def full_name(resource: NameLike) -> str:
    """The full name of a resource, given as itself or by a name.

    >>> full_name("atlas@3")
    'models/atlas/versions/3'
    >>> full_name("atlas@champion")
    'models/atlas/aliases/champion'
    >>> full_name("models/atlas/edits/0197")
    'models/atlas/edits/0197'
    """
    if not isinstance(resource, str):
        return resource.name
    if resource.startswith("models/"):
        return resource
    model, at, ref = resource.partition("@")
    if not at:
        return f"models/{model}"
    return f"models/{model}/{'versions' if ref.isdecimal() else 'aliases'}/{ref}"


def says_model(name: str) -> bool:
    """Whether a version's name says its model, too: "atlas@3", and not "3" or "champion"."""
    return "@" in name or name.startswith("models/")


def last_part(name: str) -> str:
    """The name's own part: "3" of "models/atlas/versions/3"."""
    return name.rpartition("/")[2]


def model_part(name: str) -> str:
    """The model's part: "atlas" of "models/atlas/versions/3"."""
    return name.split("/", 2)[1]
