"""What decides how a model reads a prompt besides its weights, as one digest: what was computed of prompts is named by
it where it is kept.

Left out is what changes nothing: where the checkpoint lies, how attention is computed, what wrote it, and the dtype,
which stands by itself.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from errata.editor.caching import digest_of

_VOLATILE = frozenset({"transformers_version", "dtype", "torch_dtype"})


def digest_of_reading(processor: ProcessorMixin | PreTrainedTokenizerBase, config: PreTrainedConfig) -> str:
    """Of the tokenizer, the chat template, the processor of images and the model's config."""
    return digest_of(_said(processor, config))


def _said(processor: ProcessorMixin | PreTrainedTokenizerBase, config: PreTrainedConfig) -> Iterator[str]:
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    yield _json(_vocabulary(tokenizer))
    yield _json(tokenizer.special_tokens_map)
    yield _json(getattr(processor, "chat_template", None))
    yield _json(_lasting(processor.to_dict()) if isinstance(processor, ProcessorMixin) else None)
    yield _json(_lasting(config.to_dict()))


def _vocabulary(tokenizer: Any) -> Any:
    """With the rules, where they can be told, but without how the last call was padded and cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}


def _lasting(value: Any) -> Any:
    """Without volatile entries, at any depth."""
    if isinstance(value, Mapping):
        return {str(k): _lasting(v) for k, v in value.items() if k not in _VOLATILE and not str(k).startswith("_")}
    return [_lasting(v) for v in value] if isinstance(value, list | tuple) else value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
