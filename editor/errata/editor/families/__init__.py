"""Model families: one short file each, saying where a family keeps what the editor reads and writes."""

from transformers import PreTrainedModel

from errata.editor.errors import UnknownFamilyError
from errata.editor.families.base import ModelFamily
from errata.editor.families.gemma import GEMMA, GEMMA_VISION, PALIGEMMA
from errata.editor.families.gpt2 import GPT2
from errata.editor.families.gpt_neox import GPT_NEOX
from errata.editor.families.gptj import GPTJ
from errata.editor.families.idefics import IDEFICS
from errata.editor.families.llama import LLAMA
from errata.editor.families.llava import LLAVA
from errata.editor.families.opt import OPT
from errata.editor.families.phi import PHI
from errata.editor.families.phi4 import PHI4
from errata.editor.families.qwen_vl import QWEN_VL
from errata.editor.families.structure import family_by_structure

FAMILIES: tuple[ModelFamily, ...] = (
    LLAVA,
    QWEN_VL,
    GEMMA_VISION,
    PALIGEMMA,
    IDEFICS,
    PHI4,
    LLAMA,
    GEMMA,
    GPT2,
    GPTJ,
    GPT_NEOX,
    OPT,
    PHI,
)


def family_of(model: PreTrainedModel) -> ModelFamily:
    """The family whose architectures include this model's class and whose parts it has, or that its structure shows.

    Raises UnknownFamilyError with what was found and the architectures that are known.
    """
    name = type(model).__name__
    for family in FAMILIES:
        # One architecture can have text decoders of several kinds.
        if name in family.architectures and family.fits(model):
            return family
    try:
        return family_by_structure(model)
    except UnknownFamilyError as error:
        raise unknown(name, str(error)) from None


def unknown(architecture: str, found: str) -> UnknownFamilyError:
    """The error for an architecture that no family names; `found` says why its structure does not help."""
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    return UnknownFamilyError(
        f"no model family fits the architecture {architecture!r}, and its structure does not show one: {found}. "
        f"Supported are {known}. A new family is one short file beside errata/editor/families/llama.py"
    )


__all__ = ["FAMILIES", "ModelFamily", "family_of", "unknown"]
