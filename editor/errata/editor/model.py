"""A loaded model with its processor and family: the one object that the algorithms take.

Turns prompts into token ids, finds the constraint's tokens, and answers. Knows nothing about traces or edits.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, cast

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from errata.editor.errors import ConstraintNotFoundError, InvalidInputError, LayerError, PromptError, TargetError
from errata.editor.families import ModelFamily
from errata.editor.memory import Memory
from errata.editor.prompts import Constraint, Prompt
from errata.editor.reading import digest_of_reading
from errata.editor.requests import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A prompt, and the answer after it if there is one, as one row of tokens.

    `spans[t]` are the characters of token t in the prompt's own text; None for tokens of the template, the image
    and the answer. `images[i]` are the tokens from the first to the last of image i. `vision` holds what the tower
    takes (`pixel_values` and its like), whose first axis is the row's images or their patches. `token_types` holds
    what else the model is told of each token of the prompt.
    """

    ids: Int[Tensor, " tokens"]
    prompt_length: int
    spans: tuple[tuple[int, int] | None, ...] = field(repr=False)
    images: tuple[range, ...]
    vision: dict[str, Tensor] = field(repr=False)
    token_types: dict[str, Int[Tensor, " prompt_tokens"]] = field(repr=False, default_factory=dict)

    @property
    def shape(self) -> tuple[int, Hashable]:
        """The tokens, and what else rows must have in common to share a batch without padding."""
        return len(self.ids), (len(self.images), *((name, x.shape[1:]) for name, x in sorted(self.vision.items())))

    @property
    def answer(self) -> Int[Tensor, " answer_tokens"]:
        """The ids of the answer; empty where the row is a prompt alone."""
        return self.ids[self.prompt_length :]

    def positions(self, start: int, end: int) -> range:
        """The tokens that carry the characters start … end of the prompt's text.

        Raises ConstraintNotFoundError where there are none: those characters are an image's placeholder.
        """
        tokens = [t for t, s in enumerate(self.spans) if s is not None and s[0] < end and s[1] > start]
        if not tokens:
            raise ConstraintNotFoundError(
                "the constraint has no token of the prompt's text: it is an image placeholder; give the words that "
                "refer to the image",
                field="constraint.text",
            )
        return range(tokens[0], tokens[-1] + 1)

    def replaced(self, ids: Tensor) -> "Encoded":
        """The same row with other token ids of the same length."""
        return replace(self, ids=ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model generated greedily, stopping by itself, for one prompt."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, kw_only=True)  # no slots: what is computed once lies in its __dict__
class EditableModel:
    """A model of a known family with its processor, bound to its checkpoint by hash."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin | PreTrainedTokenizerBase
    family: ModelFamily
    base_sha256: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, alone or inside the processor."""
        return cast(PreTrainedTokenizerBase, getattr(self.processor, "tokenizer", self.processor))

    @cached_property
    def reading_sha256(self) -> str:
        """What decides how prompts are read besides the weights and their dtype: `reading`. Taken when first asked."""
        return digest_of_reading(self.processor, self.model.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.family.layers_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs must be."""
        return self.model.device

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt, its images' and its answer's together; None where the config knows no limit."""
        text = self.model.config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # Past it Phi-3 reads all positions otherwise: those before it, and those of the rows beside it.
            return int(rope["original_max_position_embeddings"])
        return getattr(text, "max_position_embeddings", None)

    @property
    def sliding_window(self) -> tuple[int | None, bool]:
        """Tokens that a layer which slides sees, None where none does; and whether only layers of that kind slide.

        A config may have a window that none of its layers slides: Qwen's, whose layers do from one on.
        """
        text = self.model.config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        by_kind = "sliding_attention" in (kinds or ())
        return (getattr(text, "sliding_window", None) if by_kind or not kinds else None), by_kind

    @property
    def image_token_id(self) -> int | None:
        """The id of an image token; None for a text-only model."""
        return self.family.image_token_id(self.model)

    def down_projection(self, layer: int) -> nn.Module:
        """The MLP down-projection of a layer. Raises LayerError where there is no such layer."""
        self.check_layers((layer,))
        return self.layers[layer].get_submodule(self.family.down_projection)

    def down_projection_name(self, layer: int) -> str:
        """Its full module path, as adapters name it."""
        self.check_layers((layer,))
        return ".".join((self.family.decoder, self.family.layers, str(layer), self.family.down_projection))

    def check_layers(self, layers: Sequence[int], field: str = "layers") -> None:
        """Raises LayerError unless every layer exists."""
        for layer in layers:
            if not 0 <= layer < len(self.layers):
                raise LayerError(
                    f"{self.name!r} has no layer {layer}; its {len(self.layers)} layers are counted from 0", field=field
                )

    def encode(self, prompt: Prompt, answer: str | None = None) -> Encoded:
        """The prompt as the model is given it, with `answer` after it where one is given.

        Chat models: the template is put around the text, and an answer ends with the end-of-sequence token.
        Raises PromptError for images a model cannot take and for more tokens than its context holds, and TargetError
        for an answer without tokens.
        """
        return next(self.encode_each(prompt, (answer,)))

    def encode_each(self, prompt: Prompt, answers: Iterable[str | None]) -> Iterator[Encoded]:
        """What `encode` gives for each of the answers; the prompt and its images are read once."""
        read = self.read(prompt)
        for answer in answers:
            yield read.row if answer is None else read.answered(answer)

    def read(self, prompt: Prompt) -> "ReadPrompt":
        """The prompt's row, to which answers can be put later. Raises PromptError as `encode`."""
        text, after = self._rendered(prompt)
        special = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        read = self._processed(text, prompt.images, special) if prompt.images else _Read(text=text, laid_out=text)
        tokens = self.tokenizer(read.text, return_offsets_mapping=True, add_special_tokens=special)
        ids, offsets = torch.tensor(tokens["input_ids"]), tokens["offset_mapping"]
        if read.ids is not None and not torch.equal(ids, read.ids):
            raise PromptError(
                "the processor's tokens do not agree with the tokenizer's after image expansion; this processor "
                "needs a model family of its own",
                field="prompt.images",
            )
        self._check_length(prompt, len(ids))
        images = tuple(self._image_run(ids, offsets, image) for image in read.images)
        if "mm_token_type_ids" in read.token_types and any(a.stop == b.start for a, b in pairwise(images)):
            raise PromptError(
                f"{self.name!r} tells images apart by what stands between them, and two have nothing there; put text "
                "or the model's own marks between their placeholders, or ask with its chat template",
                field="prompt.images",
            )
        own = read.characters(prompt.text, self.placeholder, after)
        # Without its tokens' types such a model would see the answer from the prompt.
        types = {"token_type_ids": torch.zeros_like(ids)} if self.family.answer_token_type else {}
        row = Encoded(
            ids=ids,
            prompt_length=len(ids),
            spans=tuple(_span([own[c] for c in range(a, b) if c in own]) for a, b in offsets),
            images=images,
            vision=read.vision,
            token_types=types | read.token_types,
        )
        return ReadPrompt(model=self, prompt=prompt, text=read.text, special=special, row=row)

    def encode_at(self, context: Context, answer: str | None = None, *, field: str) -> tuple[Encoded, int]:
        """The context's prompt as `encode` makes it, and its constraint's last token; errors name `field`'s part."""
        with naming(field):
            encoded = self.encode(context.prompt, answer)
            return encoded, encoded.positions(*context.constraint.span(context.prompt.text))[-1]

    def constraint_positions(self, prompt: Prompt, constraint: Constraint) -> range:
        """The token positions of the constraint, after image expansion."""
        start, end = constraint.span(prompt.text)
        return self.encode(prompt).positions(start, end)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 64,
        memory: Memory | None = None,
        field: Callable[[int], str] | None = None,
    ) -> list[Answer]:
        """Greedy answers, each stopping by itself at the end-of-sequence token, at `max_new_tokens` or where the
        model's context ends. What a checkpoint configures besides, penalties or words never said, is left out.

        Prompts of one length share a batch, so that no row is padded and none depends on its neighbours; batches are
        cut to what `memory` holds, None: the device's own. Raises as `encode`, naming `field` of the prompt's number
        where it is given; MemoryLimitError where not even one prompt fits.
        """
        check_room(max_new_tokens)
        encoded = self.encode_all(prompts, field)
        answers: list[Answer | None] = [None] * len(prompts)

        def run(rows: Sequence[int]) -> None:
            batch = [encoded[i] for i in rows]
            for i, answer in zip(rows, self._generate(batch, max_new_tokens), strict=True):
                answers[i] = answer

        fits = memory or Memory.of(self.device)
        for rows in by_length(encoded, batch_size):
            row_bytes = (len(encoded[rows[0]].ids) + max_new_tokens) * self.token_bytes
            fits.parts(run, rows, most=batch_size, row_bytes=row_bytes)
        return [a for a in answers if a is not None]

    def encode_all(self, prompts: Sequence[Prompt], field: Callable[[int], str] | None = None) -> list[Encoded]:
        """Every prompt as `encode` makes it; errors name `field` of the prompt's number where it is given."""
        rows = []
        for i, prompt in enumerate(prompts):
            with naming(field(i) if field else None):
                rows.append(self.encode(prompt))
        return rows

    def _generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[Answer]:
        inputs = self.inputs(batch)
        length = inputs["input_ids"].shape[1]
        room = max_new_tokens if self.context_length is None else self.context_length - length
        with torch.inference_mode(), _plain_generation(self.model):
            out = cast(Any, self.model).generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=min(max_new_tokens, room),
                pad_token_id=max(self.end_token_id, 0),
            )
        return [self.answer_of(row) for row in out[:, length:].tolist()]

    @property
    def token_bytes(self) -> int:
        """About what one token of a row takes: keys and values in all layers, one layer's states, the head's logits."""
        config = self.model.config.get_text_config()
        states = (2 * len(self.layers) + 16) * config.hidden_size * self.model.dtype.itemsize
        return int(states) + 4 * int(config.vocab_size)

    def answer_of(self, tokens: Sequence[int]) -> Answer:
        """What generated tokens say, up to the first that ends an answer."""
        ends = self.end_token_ids
        end = next((t for t, token in enumerate(tokens) if token in ends), len(tokens))
        text = str(self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)).strip()
        return Answer(text=text, tokens=tuple(tokens[:end]), finished=end < len(tokens))

    @property
    def end_token_ids(self) -> frozenset[int | None]:
        """The tokens after which nothing is generated."""
        configured = self.model.generation_config.eos_token_id  # one, or several as in Llama 3
        return frozenset([self.end_token_id, *(configured if isinstance(configured, list) else [configured])])

    @property
    def end_token_id(self) -> int:
        """The token that ends an answer."""
        end = self.tokenizer.eos_token_id
        if end is None:
            configured = self.model.generation_config.eos_token_id
            end = configured[0] if isinstance(configured, list) else configured
        return -1 if end is None else int(end)

    def inputs(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """What the model's forward takes for rows of one length."""
        vision = {k: torch.cat([e.vision[k] for e in batch]) for k in batch[0].vision}
        ids = torch.stack([e.ids for e in batch])
        types = {
            k: torch.stack([self._typed(e.token_types[k], len(e.ids)) for e in batch]) for k in batch[0].token_types
        }
        cast = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in vision.items()}
        return {k: v.to(self.device) for k, v in {"input_ids": ids, **types, **cast}.items()}

    def _typed(self, types: Int[Tensor, " prompt_tokens"], tokens: int) -> Int[Tensor, " tokens"]:
        """Of a row that goes on with an answer."""
        more = types.new_full((max(0, tokens - len(types)),), self.family.answer_token_type)
        return torch.cat([types, more])[:tokens]

    def _check_length(self, prompt: Prompt, tokens: int, answer: int = 0) -> None:
        """Raises PromptError where a prompt of so many tokens and its answer, or one token more, do not fit."""
        holds = self.context_length
        if holds is None or tokens + max(1, answer) <= holds:
            return
        shown = f'the prompt "{prompt.text[:40]}…" has {tokens} tokens, those of images included'
        if tokens >= holds:
            raise PromptError(
                f"{shown}; the context of {self.name!r} holds {holds} with the answer; shorten it", field="prompt.text"
            )
        raise PromptError(
            f"{shown}, and its answer {answer}; the context of {self.name!r} holds {holds}; shorten them",
            field="target",
        )

    def _rendered(self, prompt: Prompt) -> tuple[str, int]:
        """The prompt in its template with one placeholder an image, and the characters that follow its own text."""
        placeholder = self.placeholder
        if prompt.images and placeholder is None:
            raise PromptError(f"{self.name!r} is a text-only model; drop the image", field="prompt.images")
        inline = placeholder is not None and placeholder in prompt.text
        if inline and prompt.text.count(placeholder or "") != len(prompt.images):
            raise PromptError(
                f"the text holds {prompt.text.count(placeholder or '')} image placeholders for "
                f"{len(prompt.images)} image(s); give one each",
                field="prompt.images",
            )
        before = "" if inline else (placeholder or "") * len(prompt.images)
        if not (prompt.chat and getattr(self.processor, "chat_template", None)):
            return before + prompt.text, 0
        shown = [] if inline else [{"type": "image"}] * len(prompt.images)
        text = self._in_template(prompt.text, shown)
        # The template may itself say what the prompt says, so where its text ends is read off another text.
        mark = "\ue000"
        after = len(self._in_template(mark, shown).partition(mark)[2])
        if not text[: len(text) - after].endswith(prompt.text):
            raise PromptError(
                f"the chat template changes the text {prompt.text!r} (it may strip spaces); give it as it will stand",
                field="prompt.text",
            )
        return text, after

    def _in_template(self, text: str, shown: list[dict[str, str]]) -> str:
        content: Any = text
        if self.image_token_id is not None:
            content = [*shown, {"type": "text", "text": text}]
        conversation = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    @property
    def placeholder(self) -> str | None:
        """What stands for an image in a prompt's text; None for a text-only model."""
        if self.image_token_id is None:
            return None
        token = getattr(self.processor, "image_token", None)
        return str(token or self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    def _processed(self, text: str, images: Sequence[Image.Image], special: bool) -> "_Read":
        """What the processor makes of a text with one placeholder an image."""
        processor, given = cast(Any, self.processor), {"text": [text], "images": list(images)}
        if text.count(self.placeholder or "") != len(images):
            raise PromptError(
                f"{len(images)} image(s) for {text.count(self.placeholder or '')} placeholder(s) in {text!r}",
                field="prompt.images",
            )
        found = processor(**given, **_READING, add_special_tokens=special)
        expansions = found.pop("text_replacement_offsets")[0]
        laid_out = processor.prepare_inputs_layout(**given)[1][0]
        expanded, at = "", 0
        for expansion in expansions:
            start, end = expansion["span"]
            expanded, at = expanded + laid_out[at:start] + expansion["replacement"], end
        ids = found.pop("input_ids")[0]
        return _Read(
            text=expanded + laid_out[at:],
            laid_out=laid_out,
            placeholders=tuple(e["span"] for e in expansions),
            images=tuple(e["new_span"] for e in expansions),
            ids=ids,
            vision={k: v for k, v in found.items() if k not in _PER_TOKEN and isinstance(v, Tensor)},
            token_types={k: v[0] for k, v in found.items() if k.endswith("token_type_ids")},
        )

    def _image_run(self, ids: Tensor, offsets: Sequence[tuple[int, int]], image: tuple[int, int]) -> range:
        """The tokens from the first to the last of an image that became these characters."""
        within = [t for t, (a, b) in enumerate(offsets) if image[0] <= a and b <= image[1] and b > a]
        tokens = [t for t in within if ids[t] == self.image_token_id]
        return range(tokens[0], tokens[-1] + 1)

    def _answer_ids(self, prompt: "ReadPrompt", answer: str) -> Int[Tensor, " answer_tokens"]:
        text, special, prompt_ids = prompt.text, prompt.special, prompt.row.ids.tolist()
        if not answer.strip():
            raise TargetError("the target is empty; give the answer the model should say", field="target")
        joined = text + ("" if text[-1].isspace() else " ") + answer.strip()
        ids = self.tokenizer(joined, add_special_tokens=special)["input_ids"]
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            # The tokenizer merges across the border; the prompt keeps its own tokens.
            ids = self.tokenizer(joined[len(text) :], add_special_tokens=False)["input_ids"]
        if not ids or not {*self.tokenizer.all_special_ids, self.image_token_id}.isdisjoint(ids):
            raise TargetError(f"the target {answer!r} cannot be written in this model's tokens", field="target")
        if prompt.prompt.chat and getattr(self.processor, "chat_template", None):
            ids = [*ids, self.end_token_id]
        self._check_length(prompt.prompt, len(prompt_ids), len(ids))
        return torch.tensor(ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompt:
    """A prompt as the model is given it, with its images processed: `text` is what stands behind its template."""

    model: EditableModel
    prompt: Prompt
    text: str = field(repr=False)
    special: bool
    row: Encoded

    def answered(self, answer: str) -> Encoded:
        """The row with the answer behind it. Raises PromptError where both do not fit, TargetError as `encode`."""
        ending = self.model._answer_ids(self, answer)
        return self._followed(ending)

    def said(self, answer: "Answer") -> Encoded:
        """The row with what the model itself answered behind it: its text as any other answer is written, or, where
        that does not fit or cannot be written, the tokens that it generated, up to one of an image's.
        """
        if not answer.text:
            return self.row
        try:
            return self.answered(answer.text)
        except InvalidInputError:
            text = list(takewhile(lambda token: token != self.model.image_token_id, answer.tokens))
            return self._followed(torch.tensor(text, dtype=torch.long))

    def _followed(self, ending: Int[Tensor, " answer_tokens"]) -> Encoded:
        spans = (*self.row.spans, *(None for _ in ending))
        return replace(self.row, ids=torch.cat([self.row.ids, ending]), spans=spans)


_READING = {"return_tensors": "pt", "return_text_replacement_offsets": True}
_PER_TOKEN = ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A rendered prompt as a processor reads it: `laid_out` with one placeholder an image, `text` with the images' own.

    `placeholders` are the characters of each placeholder in `laid_out`, `images` those of what it became in `text`.
    """

    text: str
    laid_out: str
    placeholders: tuple[tuple[int, int], ...] = ()
    images: tuple[tuple[int, int], ...] = ()
    ids: Tensor | None = None
    vision: dict[str, Tensor] = field(default_factory=dict)
    token_types: dict[str, Tensor] = field(default_factory=dict)

    def characters(self, own: str, placeholder: str | None, after: int) -> Mapping[int, int]:
        """Where in the prompt's own text each character of `text` stands that is from there.

        The own text is the last in `laid_out` but for `after` characters of the template, and what a processor adds.
        """
        where: dict[int, int] = {}
        at, at_own = len(self.laid_out) - after, len(own)
        pieces = own.split(placeholder) if placeholder else [own]
        for n, piece in enumerate(reversed(pieces)):
            if n and placeholder:
                at, at_own = self.laid_out.rindex(placeholder, 0, at), at_own - len(placeholder)
            at, at_own = self.laid_out.rindex(piece, 0, at), at_own - len(piece)
            grown = self._grown(at)
            where |= {grown + at + i: at_own + i for i in range(len(piece))}
        return where

    def _grown(self, at: int) -> int:
        """By how many characters the images before a character of `laid_out` are longer than their placeholders."""
        spans = zip(self.placeholders, self.images, strict=True)
        return sum((d - c) - (b - a) for (a, b), (c, d) in spans if b <= at)


def _span(characters: Sequence[int]) -> tuple[int, int] | None:
    return (characters[0], characters[-1] + 1) if characters else None


class ReadPositions:
    """The positions that the decoder was last told, which are not everywhere those of the tokens in their row."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None

    def hear(self, _decoder: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """A hook before the decoder runs."""
        self._ids = given.get("position_ids")

    def ahead(self, rows: int, tokens: int) -> Int[Tensor, " rows"]:
        """By how much the position of each row's next token is larger than the `tokens` it has."""
        if self._ids is None:
            return torch.zeros(rows, dtype=torch.long)
        # Where positions have several dimensions, an image's width and height, text goes on behind the largest.
        last = self._ids.amax(-1) if self._ids.dim() < 3 else self._ids.amax((0, -1))
        return (last + 1 - tokens).expand(rows)


@contextmanager
def reading_positions(model: EditableModel) -> Iterator[ReadPositions]:
    """While open, what positions the decoder is told is kept: a row that is decoded further goes on from there."""
    read = ReadPositions()
    handle = model.family.decoder_of(model.model).register_forward_pre_hook(read.hear, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """While open, `generate` does nothing that a checkpoint configures but for the tokens that end an answer."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=before.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = before


def check_room(max_new_tokens: int) -> None:
    """Raises InvalidInputError for no token at all."""
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens is {max_new_tokens}; give at least 1", field="max_new_tokens")


@contextmanager
def naming(field: str | None) -> Iterator[None]:
    """While open, an error in what the caller gave names `field`'s part; None: as it is."""
    try:
        yield
    except InvalidInputError as error:
        if field is None:
            raise
        raise error.within(field) from None


def by_length(encoded: Sequence[Encoded], limit: int) -> list[list[int]]:
    """Indices of rows that can share a batch without padding: of one `Encoded.shape`, at most `limit` rows."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, row in enumerate(encoded):
        groups[row.shape].append(i)
    return [rows[i : i + limit] for rows in groups.values() for i in range(0, len(rows), limit)]


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same but for case, outer spaces and a closing full stop."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").casefold()

    return plain(a) == plain(b)
