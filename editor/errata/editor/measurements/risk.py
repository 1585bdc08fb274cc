"""How far an answer is to be trusted, by the model's own confidence (methods.md §3; Basu et al. 2024, §5).

It costs nothing while generating: it is made from the log p of each token that was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp

import torch

from errata.editor.errors import InvalidInputError, TargetError
from errata.editor.measurements.contributions import answer_log_probabilities
from errata.editor.model import Answer, EditableModel, Encoded
from errata.editor.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """How far an answer is to be trusted: p of the whole generated answer with its end, and of its first token."""

    confidence: float
    first: float

    @property
    def score(self) -> float:
        """1 − p(answer), 0 … 1: to be ranked or held against a threshold chosen on questions like those asked. It is
        no probability of being wrong, and long answers have more of it.
        """
        return 1 - self.confidence


def risk_of(log_probabilities: Sequence[float]) -> Risk:
    """The risk of an answer from the log p of each of its tokens in turn, its end-of-sequence token included.

    An engine has them in the logits it chose the tokens from. Raises InvalidInputError for no token at all.
    """
    if not log_probabilities:
        raise InvalidInputError("an answer of no tokens has no risk; give at least its end", field="log_probabilities")
    return Risk(confidence=exp(sum(log_probabilities)), first=exp(log_probabilities[0]))


def risk(model: EditableModel, prompt: Prompt, answer: Answer) -> Risk:
    """The risk of what `model.generate` answered to `prompt`, by one forward pass."""
    row = with_answer(model, model.encode(prompt), answer)
    with torch.no_grad():
        logits = model.model(**model.inputs([row]), use_cache=False, logits_to_keep=len(row.answer) + 1).logits[0]
    return risk_of(answer_log_probabilities(logits, row.answer.to(logits.device)).tolist())


def with_answer(model: EditableModel, row: Encoded, answer: Answer) -> Encoded:
    """The row with the very tokens that were generated after it, and the end where the model came to one.

    Raises TargetError for an answer that holds an image token: the model would look for that image.
    """
    if model.image_token_id in answer.tokens:
        raise TargetError("the answer holds an image token, so its probability cannot be read", field="answer")
    ids = torch.tensor([*answer.tokens, *([model.end_token_id] if answer.finished else [])], dtype=torch.long)
    return replace(row, ids=torch.cat([row.ids, ids]), spans=(*row.spans, *(None for _ in ids)))
