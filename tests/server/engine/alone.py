"""What versions answer alone, by the editor's own generation: what every batch is held to."""

from collections.abc import Callable, Sequence

from tiny import question

from errata.editor.delta import Delta, applied
from errata.editor.model import Answer, EditableModel
from errata.editor.prompts import Prompt
from errata.server.engine import Engine

StartEngine = Callable[..., Engine]
WAIT = 120
"""Seconds after which a test that hangs fails."""


def prompts_of(model: EditableModel) -> list[Prompt]:
    """Prompts of several lengths, with and without images where the family takes any."""
    texts = ["What is the capital of this country?", "Rome", "The Space Needle is in the city of", "What is this?"]
    prompts = [Prompt(text=t) for t in texts]
    return [question(model, t, seed=i) for i, t in enumerate(texts)] + prompts


def alone(model: EditableModel, prompt: Prompt, lineage: Sequence[Delta], max_new_tokens: int) -> Answer:
    with applied(model, *lineage):
        return model.generate([prompt], max_new_tokens=max_new_tokens)[0]
