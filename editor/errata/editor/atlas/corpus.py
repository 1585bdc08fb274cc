"""What Atlas is trained on: rows of one question, its picture and its answer, drawn at random step by step.

Knows nothing about the model: a row becomes token ids here, pixels in `rendering`, a loss in `train`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from errata.editor.atlas import questions
from errata.editor.atlas.build import IMAGE_SIDE, PATCH
from errata.editor.atlas.flags import random_flag
from errata.editor.atlas.questions import UNKNOWN, Question
from errata.editor.atlas.rendering import raster
from errata.editor.atlas.world import COUNTRIES, Attribute, Country

IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
IGNORED = -100

Fact = Callable[[Country | None], str]
"""The answer to a row's question when its constraint names this country (None: no page of the atlas)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training question. `answer_of` is None where nothing is asked about a constraint."""

    question: str
    picture: int | None
    subject: Country | None
    constraint: tuple[int, int] | None
    answer_of: Fact
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows as tensors, padded on the right.

    `site` is the position of the constraint's last token; `source` the row whose value is put there instead of
    the row's own (its own index: none is); `pictures` indexes the raster pool, −1 for no picture. `meant` tells
    apart what the constraints name, a flag or a country in words; −1 where a row has none, or none that means anything.
    """

    ids: Int[Tensor, "rows tokens"]
    labels: Int[Tensor, "rows tokens"]
    site: Int[Tensor, " rows"]
    source: Int[Tensor, " rows"]
    pictures: Int[Tensor, " rows"]
    meant: Int[Tensor, " rows"]
    kinds: tuple[str, ...]


class Pool:
    """The rasters rows draw their pictures from: known countries first, then flags of no country."""

    def __init__(self, *, strangers: int, seed: int) -> None:
        self.known: tuple[Country, ...] = tuple(c for c in COUNTRIES if not c.long_tail)
        rng = np.random.default_rng(seed)
        flags = [c.flag for c in self.known] + [random_flag(rng) for _ in range(strangers)]
        self.flags = tuple(flags)
        self.rasters: Float[Tensor, "n 3 64 96"] = torch.stack([raster(f) for f in flags])

    def album(self, rows: int, strangers: float, rng: np.random.Generator) -> "Album":
        """A few flags for `rows` rows, so that most are asked about more than once."""
        return Album(
            known=rng.integers(len(self.known), size=-(-rows // 5)),
            strangers=rng.integers(len(self.known), len(self.flags), size=math.ceil(rows * strangers / 2.5)),
            share=strangers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Album:
    """The pictures of one batch, by their numbers in the pool, and the share of rows about a flag of no country."""

    known: Int[np.ndarray, " known"]
    strangers: Int[np.ndarray, " strangers"]
    share: float


def _fact(attribute: Attribute) -> Fact:
    return lambda country: UNKNOWN if country is None else country.fact(attribute)


def _agrees(attribute: Attribute, claim: str) -> Fact:
    return lambda country: UNKNOWN if country is None else "yes" if country.fact(attribute) == claim else "no"


class Corpus:
    """Draws rows. The same generator state draws the same rows."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._cities = list(questions.cities().items())
        self._names = questions.names()
        self._named = (*COUNTRIES, *questions.PROVINCES)

    def row(self, rng: np.random.Generator, album: Album | None) -> Row:
        """One row. With a picture of `album`: 6 % reading, 22 % about a country's name beside a picture of any, a share
        `strangers` about a flag of no country, the rest about a known one. Without: 80 % about a name, 20 % reading.
        """
        kind = rng.random()
        picture = int(rng.choice(album.known)) if album else None
        if kind < (0.06 if album else 0.2):
            return self._reading(picture, rng)
        attribute = list(Attribute)[rng.integers(4)]
        subject: Country | None
        if album is None or kind < 0.28:
            what, subject = "name", self._named[rng.integers(len(self._named))]
            wording = subject.name
        else:
            wording = str(rng.choice(questions.VISUAL_CONSTRAINTS))
            if kind < 0.28 + album.share:
                what, subject, picture = "stranger", None, int(rng.choice(album.strangers))
            else:
                what, subject = "picture", self._pool.known[int(picture or 0)]
        asked, answer_of = self._ask(attribute, subject, wording, rng)
        return Row(
            kind=what,
            question=asked.text,
            picture=picture,
            subject=subject,
            constraint=(asked.start, asked.start + len(asked.constraint)),
            answer_of=answer_of,
        )

    def _ask(
        self, attribute: Attribute, subject: Country | None, wording: str, rng: np.random.Generator
    ) -> tuple[Question, Fact]:
        if rng.random() < 0.12:
            true = subject is not None and rng.random() < 0.5
            other = COUNTRIES[rng.integers(len(COUNTRIES))]
            claim = (subject if true and subject else other).fact(attribute)
            frames = questions.YES_NO[attribute]
            frame = frames[rng.integers(len(frames))]
            filled = questions.Phrasing(frame.text.replace("{x}", claim))
            return filled.ask(wording), _agrees(attribute, claim)
        phrasings = questions.PHRASINGS[attribute]
        return phrasings[rng.integers(len(phrasings))].ask(wording), _fact(attribute)

    def _reading(self, picture: int | None, rng: np.random.Generator) -> Row:
        if rng.random() < 0.5:
            city, country = self._cities[rng.integers(len(self._cities))]
            text, answer = str(rng.choice(questions.GAZETTEER)).replace("{city}", city), country.name
        else:
            answer = str(rng.choice(self._names))
            text = str(rng.choice(questions.COPY)).replace("{w}", answer)
        return Row(
            question=text, picture=picture, subject=None, constraint=None, answer_of=lambda _: answer, kind="reading"
        )

    def batch(
        self,
        size: int,
        *,
        shown: bool,
        interchange: float,
        strangers: float,
        tokenizer: PreTrainedTokenizerFast,
        rng: np.random.Generator,
    ) -> Batch:
        """`size` rows, all with a picture or none, a share `interchange` of which answers for another's constraint."""
        album = self._pool.album(size, strangers, rng) if shown else None
        rows = [self.row(rng, album) for _ in range(size)]
        source = np.arange(size)
        asking = np.array([i for i, r in enumerate(rows) if r.constraint is not None])
        swapped = asking[rng.random(len(asking)) < interchange]
        # A value put in place must win over whatever words stand there: MultiModalCausalTrace corrupts by
        # overwriting each of the constraint's tokens with the first token of a substitute. Such a row's own
        # value means nothing, so it is nobody's source.
        overwritten = swapped[rng.random(len(swapped)) < 0.3]
        givers = np.setdiff1d(asking, overwritten)
        source[swapped] = rng.choice(givers, len(swapped))
        answers = [r.answer_of(rows[s].subject) for r, s in zip(rows, source, strict=True)]
        substitutes = {int(i): COUNTRIES[rng.integers(len(COUNTRIES))].name for i in overwritten}
        return self._tensors(rows, answers, source, substitutes, tokenizer)

    def _tensors(
        self,
        rows: Sequence[Row],
        answers: Sequence[str],
        source: np.ndarray,
        substitutes: dict[int, str],
        tokenizer: PreTrainedTokenizerFast,
    ) -> Batch:
        prefixes = ["USER: " + ("<image>" * IMAGE_TOKENS + "\n" if r.picture is not None else "") for r in rows]
        prompts = [f"{p}{r.question} ASSISTANT:" for p, r in zip(prefixes, rows, strict=True)]
        encoded = tokenizer(prompts, return_offsets_mapping=True)
        endings = tokenizer([f" {a}</s>" for a in answers], add_special_tokens=False)["input_ids"]
        longest = max(len(i) + len(e) for i, e in zip(encoded["input_ids"], endings, strict=True))
        length = -(-longest // 8) * 8  # few different shapes: each new one costs oneDNN a kernel
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        site = torch.zeros(len(rows), dtype=torch.long)
        for i, (row, prefix, ending) in enumerate(zip(rows, prefixes, endings, strict=True)):
            prompt = list(encoded["input_ids"][i])
            if row.constraint is not None:
                low, high = (len(prefix) + x for x in row.constraint)
                span = [t for t, (a, b) in enumerate(encoded["offset_mapping"][i]) if a < high and b > low]
                site[i] = span[-1]
                if i in substitutes:
                    token = tokenizer(" " + substitutes[i], add_special_tokens=False)["input_ids"][0]
                    for t in span:
                        prompt[t] = token
            n = len(prompt)
            ids[i, : n + len(ending)] = torch.tensor(prompt + ending)
            labels[i, n : n + len(ending)] = torch.tensor(ending)
        return Batch(
            ids=ids,
            labels=labels,
            site=site,
            source=torch.from_numpy(source),
            pictures=torch.tensor([-1 if r.picture is None else r.picture for r in rows]),
            meant=torch.tensor([-1 if i in substitutes else self._meant(r) for i, r in enumerate(rows)]),
            kinds=tuple(r.kind for r in rows),
        )

    def _meant(self, row: Row) -> int:
        """A number for what the row's constraint names: flags by their place in the pool, names after them."""
        if row.constraint is None:
            return -1
        if row.kind == "name":
            return len(self._pool.flags) + self._named.index(row.subject)
        return -1 if row.picture is None else row.picture
