"""A loaded model with its processor and family: the one object that the algorithms take.

Turns prompts into token ids, finds the constraint's tokens, and answers. Knows nothing about traces or edits.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from errata.editor.errors import ConstraintNotFoundError, InvalidInputError, LayerError, PromptError, TargetError
from errata.editor.families import ModelFamily
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context

_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Said in full, because generate() takes whatever is not said from the defaults that a checkpoint ships."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A prompt, and the answer after it if there is one, as one row of tokens.

    `spans[t]` are the characters of token t in the prompt's own text; None for tokens of the template, the image
    and the answer. `vision` holds what the tower takes (`pixel_values` and its like), batch first.
    """

    ids: Int[Tensor, " tokens"]
    prompt_length: int
    spans: tuple[tuple[int, int] | None, ...] = field(repr=False)
    images: tuple[range, ...]
    vision: dict[str, Tensor] = field(repr=False)

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
        return Encoded(
            ids=ids, prompt_length=self.prompt_length, spans=self.spans, images=self.images, vision=self.vision
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model generated greedily, stopping by itself, for one prompt."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
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
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

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
        text, after = self._rendered(prompt)
        special = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        vision: dict[str, Tensor] = {}
        each = 1
        if prompt.images:
            vision = dict(self.processor(text=[text], images=list(prompt.images), return_tensors="pt"))
            expected = vision.pop("input_ids")[0]
            vision.pop("attention_mask", None)
            text, each = self._expanded(text, expected, len(prompt.images))
        tokens = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        ids = torch.tensor(tokens["input_ids"])
        if prompt.images and not torch.equal(ids, expected):
            raise PromptError(
                "the processor's tokens do not agree with the tokenizer's after image expansion; this processor "
                "needs a model family of its own",
                field="prompt.images",
            )
        spans = self._spans(prompt.text, text, after, each, tokens["offset_mapping"])
        ending = self._answer_ids(text, answer, special, prompt.chat) if answer is not None else ids[:0]
        self._check_length(len(ids), len(ending))
        return Encoded(
            ids=torch.cat([ids, ending]),
            prompt_length=len(ids),
            spans=(*spans, *(None for _ in ending)),
            images=self._image_runs(ids, each),
            vision=vision,
        )

    def encode_at(self, context: Context, answer: str | None = None, *, field: str) -> tuple[Encoded, int]:
        """The context's prompt as `encode` makes it, and its constraint's last token; errors name `field`'s part."""
        try:
            encoded = self.encode(context.prompt, answer)
            return encoded, encoded.positions(*context.constraint.span(context.prompt.text))[-1]
        except InvalidInputError as error:
            raise error.within(field) from None

    def constraint_positions(self, prompt: Prompt, constraint: Constraint) -> range:
        """The token positions of the constraint, after image expansion."""
        start, end = constraint.span(prompt.text)
        return self.encode(prompt).positions(start, end)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 16, batch_size: int = 64) -> list[Answer]:
        """Greedy answers, each stopping by itself at the end-of-sequence token, at `max_new_tokens` or where the
        model's context ends.

        Prompts of one length share a batch, so that no row is padded and none depends on its neighbours.
        """
        encoded = [self.encode(p) for p in prompts]
        answers: list[Answer | None] = [None] * len(prompts)
        for rows in by_length(encoded, batch_size):
            batch = [encoded[i] for i in rows]
            for i, answer in zip(rows, self._generate(batch, max_new_tokens), strict=True):
                answers[i] = answer
        return [a for a in answers if a is not None]

    def _generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[Answer]:
        inputs = self.inputs(batch)
        length = inputs["input_ids"].shape[1]
        room = max_new_tokens if self.context_length is None else self.context_length - length
        with torch.inference_mode():
            out = cast(Any, self.model).generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=min(max_new_tokens, room),
                pad_token_id=max(self.end_token_id, 0),
                **_GREEDY,
            )
        return [self._answer(row) for row in out[:, length:].tolist()]

    def _answer(self, tokens: list[int]) -> Answer:
        configured = self.model.generation_config.eos_token_id  # one, or several as in Llama 3
        ends = {self.end_token_id, *(configured if isinstance(configured, list) else [configured])}
        end = next((t for t, token in enumerate(tokens) if token in ends), len(tokens))
        text = str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()
        return Answer(text=text, tokens=tuple(tokens[:end]), finished=end < len(tokens))

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
        vision = {k: torch.cat([e.vision[k] for e in batch if e.vision]) for k in batch[0].vision}
        ids = torch.stack([e.ids for e in batch])
        cast = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in vision.items()}
        return {k: v.to(self.device) for k, v in {"input_ids": ids, **cast}.items()}

    def _check_length(self, prompt: int, answer: int) -> None:
        """Raises PromptError where so many tokens of prompt and answer, or of the prompt and one more, do not fit."""
        holds = self.context_length
        if holds is not None and prompt >= holds:
            raise PromptError(
                f"the prompt has {prompt} tokens, those of images included; the context of {self.name!r} holds {holds} "
                "with the answer; shorten it",
                field="prompt.text",
            )
        if holds is not None and prompt + answer > holds:
            raise PromptError(
                f"the answer has {answer} tokens and the prompt {prompt}, those of images included; the context of "
                f"{self.name!r} holds {holds}; shorten them",
                field="target",
            )

    def _rendered(self, prompt: Prompt) -> tuple[str, int]:
        """The prompt in its template with one placeholder an image, and the characters that follow its own text."""
        placeholder = self._placeholder(prompt)
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

    def _placeholder(self, prompt: Prompt) -> str | None:
        if self.image_token_id is None:
            if prompt.images:
                raise PromptError(f"{self.name!r} is a text-only model; drop the image", field="prompt.images")
            return None
        return str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    def _expanded(self, text: str, ids: Tensor, images: int) -> tuple[str, int]:
        """The text with each placeholder repeated as often as an image has tokens, and how often that is."""
        assert self.image_token_id is not None
        placeholder = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        total = int(ids.eq(self.image_token_id).sum())
        if text.count(placeholder) != images or total % images:
            raise PromptError(
                f"{images} image(s) for {text.count(placeholder)} placeholder(s) in {text!r}", field="prompt.images"
            )
        each = total // images
        return text.replace(placeholder, placeholder * each), each

    def _spans(
        self, own: str, text: str, after: int, each: int, offsets: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int] | None]:
        """For each token the characters of the prompt's own text it carries, None where it carries none.

        `text` ends with the prompt's own text, each placeholder `each` times, and `after` characters of the template.
        """
        placeholder = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id)) if self.image_token_id else ""
        pieces = own.split(placeholder) if placeholder else [own]
        where: dict[int, int] = {}
        at, at_own = len(text) - after, len(own)
        for piece in reversed(pieces):
            at, at_own = at - len(piece), at_own - len(piece)
            where |= {at + i: at_own + i for i in range(len(piece))}
            at, at_own = at - len(placeholder) * each, at_own - len(placeholder)
        spans: list[tuple[int, int] | None] = []
        for a, b in offsets:
            inside = [where[c] for c in range(a, b) if c in where]
            spans.append((inside[0], inside[-1] + 1) if inside else None)
        return spans

    def _answer_ids(self, text: str, answer: str, special: bool, chat: bool) -> Tensor:
        if not answer.strip():
            raise TargetError("the target is empty; give the answer the model should say", field="target")
        joined = text + ("" if text[-1].isspace() else " ") + answer.strip()
        prompt_ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        ids = self.tokenizer(joined, add_special_tokens=special)["input_ids"]
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            # The tokenizer merges across the border; the prompt keeps its own tokens.
            ids = self.tokenizer(joined[len(text) :], add_special_tokens=False)["input_ids"]
        if not ids or not {*self.tokenizer.all_special_ids, self.image_token_id}.isdisjoint(ids):
            raise TargetError(f"the target {answer!r} cannot be written in this model's tokens", field="target")
        if chat and getattr(self.processor, "chat_template", None):
            ids = [*ids, self.end_token_id]
        return torch.tensor(ids)

    def _image_runs(self, ids: Tensor, each: int) -> tuple[range, ...]:
        """The tokens of each image, `each` of them; images may stand side by side."""
        if self.image_token_id is None:
            return ()
        tokens = (ids == self.image_token_id).nonzero().flatten().tolist()
        return tuple(range(t, t + each) for t in tokens[::each])


def by_length(encoded: Sequence[Encoded], limit: int) -> list[list[int]]:
    """Indices of rows that can share a batch without padding: one length, as many images, at most `limit` rows."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(encoded):
        groups[len(row.ids), len(row.images)].append(i)
    return [rows[i : i + limit] for rows in groups.values() for i in range(0, len(rows), limit)]


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same but for case, outer spaces and a closing full stop."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").casefold()

    return plain(a) == plain(b)
