"""How likely a version finds answers: the prompt is read once, and many answers ride on its keys and values.

Knows nothing about queues or threads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from errata.editor.mixed import MixedDeltas, VersionFactors
from errata.editor.model import EditableModel, Encoded


def log_probabilities(
    model: EditableModel,
    deltas: MixedDeltas,
    version: VersionFactors | None,
    prompt: Encoded,
    answers: Sequence[Tensor],
    *,
    max_tokens: int,
) -> Iterator[list[float]]:
    """Log p of each answer's tokens after the prompt, in order, a chunk at a time.

    A chunk holds as many answers as fit `max_tokens`, the prompt's repeated for each, and at least one.
    """
    # Not made from the config: a sliding cache drops what the answers' tokens see.
    cache = DynamicCache()
    with deltas.answering(deltas.stacked([version])):
        out = model.model(**model.inputs([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    first: Tensor = out.logits[0, -1].float().log_softmax(-1)
    size = max(1, max_tokens // (len(prompt.ids) + max(map(len, answers))))
    for start in range(0, len(answers), size):
        chunk = [a.to(model.device) for a in answers[start : start + size]]
        repeated = _repeated(cache, DynamicCache(), len(chunk))
        ids = pad_sequence(chunk, batch_first=True)
        scores = first[ids[:, 0]].double()
        if ids.shape[1] > 1:
            with deltas.answering(deltas.stacked([version] * len(chunk))):
                logits = model.model(input_ids=ids[:, :-1], past_key_values=repeated, use_cache=True).logits.float()
            each = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            lengths = torch.tensor([len(a) - 1 for a in chunk], device=model.device)
            padded = torch.arange(each.shape[1], device=model.device) >= lengths[:, None]
            scores += each.masked_fill(padded, 0).double().sum(-1)
        yield scores.tolist()


def _repeated(cache: DynamicCache, into: DynamicCache, rows: int) -> DynamicCache:
    """`into`, filled with the only row of `cache` for each of `rows`."""
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, CacheLayerMixin)
        assert layer.keys is not None
        assert layer.values is not None
        into.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    return into
