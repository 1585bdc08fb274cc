"""Model families: one short file each, saying where a family keeps what the editor reads and writes."""

from transformers import PreTrainedModel

from errata.editor.errors import UnknownFamilyError
from errata.editor.families.base import ModelFamily
from errata.editor.families.gpt2 import GPT2
from errata.editor.families.llama import LLAMA
from errata.editor.families.llava import LLAVA

FAMILIES: tuple[ModelFamily, ...] = (LLAVA, LLAMA, GPT2)


def family_of(model: PreTrainedModel) -> ModelFamily:
    """The family whose architectures include this model's class.

    Raises UnknownFamilyError with the names of those there are.
    """
    name = type(model).__name__
    for family in FAMILIES:
        if name in family.architectures:
            return family
    raise unknown(name)


def unknown(architecture: str) -> UnknownFamilyError:
    """The error for an architecture that no family names."""
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    return UnknownFamilyError(
        f"no model family knows the architecture {architecture!r}; supported are {known}. "
        "A new family is one short file beside errata/editor/families/llama.py"
    )


__all__ = ["FAMILIES", "ModelFamily", "family_of", "unknown"]
