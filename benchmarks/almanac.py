"""The recipe that makes Almanac, a small Llama that knows an invented world: `python benchmarks/almanac.py`.

Its weights are not kept in the repository; this module makes them again, seeded and resumable. Like Atlas it learns by
interchange intervention training (Geiger et al., ICML 2022): in half of the rows the output of the MLP of layer 1 at
the subject's last token is exchanged for another row's, and the row must then answer for the other's subject. So facts
are looked up by early MLPs at the subject's last token, where larger text models were found to keep them (Meng et al.
2022); a model this small would else read the name from the end of the prompt. A contrastive loss on the keys keeps
people apart, which 1,250 of them in a stream of 128 numbers would else not be. It takes some seven minutes of one core
that does bf16 in hardware.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from almanac_world import ANSWERS, HELD_OUT, PHRASINGS, PORTRAITS, Person, Relation, people, portrait
from jaxtyping import Float, Int
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from errata.editor.atlas.train import contrast, interchanged

FOLDER = Path("out/almanac")
"""Where the recipe leaves the model, in `weights`."""

FACT_LAYER = 1
"""The layer whose MLP output is interchanged."""

STEPS, ROWS, PORTRAIT_ROWS, RATE = 1600, 96, 48, 2e-3
FEW, MEET = 48, (120, 450)
"""People to begin with, and the steps over which all others join them: among many a model long learns nobody."""

CONTRAST = 0.3
"""Weight of the loss that keeps keys of different people apart, as Atlas's recipe has it."""

RISE, RESIDUAL = (120, 300), (250, 600)
"""Steps over which the share of interchanged rows rises, and that of the residual stream exchanged with it falls."""

SAVE_EVERY, TELL_EVERY, IGNORED = 100, 50, -100
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_tokenizer(everyone: Sequence[Person]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's words: answers, given names and surnames are one token each."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2304,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frames = [f.format("x") for fs in (*PHRASINGS.values(), *HELD_OUT.values(), PORTRAITS) for f in fs]
    answers = [f" {a}" for r in Relation for a in ANSWERS[r]]
    names = [part for p in everyone for part in (p.name, f" {p.name}")]
    core.train_from_iterator([*(frames * 40), *(answers * 200), *(names * 20), portrait(everyone[0].facts)], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    # The template adds nothing, but where there is one an answer ends with the end-of-sequence token.
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts with answers. `site` is the subject's last token, `source` the row whose subject is answered for.

    `person` tells whom each row itself is about.
    """

    ids: Int[Tensor, "rows tokens"]
    labels: Int[Tensor, "rows tokens"]
    site: Int[Tensor, " rows"]
    source: Int[Tensor, " rows"]
    person: Int[Tensor, " rows"]


def draw_batch(
    everyone: Sequence[Person],
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    rows: int,
    portraits: bool,
    interchange: float,
) -> Batch:
    """Questions about people at random, two of each; a share `interchange` is to be answered for another row's."""
    person = np.tile(rng.integers(len(everyone), size=rows // 2), 2)
    drawn = [everyone[i] for i in person]
    exchanged = rng.random(rows) < interchange
    source = np.where(exchanged, rng.integers(rows, size=rows), np.arange(rows))
    prompts, answers = [], []
    for i in range(rows):
        facts = drawn[source[i]].facts
        relation = tuple(Relation)[rng.integers(len(Relation))]
        frames = PORTRAITS if portraits else PHRASINGS[relation]
        prompts.append(frames[rng.integers(len(frames))])
        answers.append(portrait(facts) if portraits else facts[relation])
    names = [p.name for p in drawn]
    return encoded(tokenizer, prompts, names, answers, torch.from_numpy(source), torch.from_numpy(person))


def encoded(
    tokenizer: PreTrainedTokenizerFast,
    frames: Sequence[str],
    names: Sequence[str],
    answers: Sequence[str],
    source: Int[Tensor, " rows"],
    person: Int[Tensor, " rows"],
) -> Batch:
    """Rows padded on the right, where causality keeps the padding from reaching anything."""
    prompts = [f.format(n) for f, n in zip(frames, names, strict=True)]
    joined = tokenizer([f"{p} {a}" for p, a in zip(prompts, answers, strict=True)], return_offsets_mapping=True)
    width = max(map(len, joined["input_ids"])) + 1
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    site = torch.zeros(len(prompts), dtype=torch.long)
    for i, (row, offsets) in enumerate(zip(joined["input_ids"], joined["offset_mapping"], strict=True)):
        ids[i, : len(row) + 1] = torch.tensor([*row, tokenizer.eos_token_id])
        asked = sum(end <= len(prompts[i]) for _, end in offsets)
        labels[i, asked : len(row) + 1] = ids[i, asked : len(row) + 1]
        ends = frames[i].index("{}") + len(names[i])
        site[i] = max(t for t, (begin, _) in enumerate(offsets) if begin < ends)
    return Batch(ids=ids, labels=labels, site=site, source=source, person=person)


def answer_loss(
    model: LlamaForCausalLM, batch: Batch, residual: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
    """Cross-entropy of the answers' tokens with the keys' contrast, and whether each row's are all the likeliest."""
    with interchanged(model.model.layers[FACT_LAYER], batch.site, batch.source, residual) as keys:
        hidden = model.model(batch.ids, use_cache=False).last_hidden_state[:, :-1]
    asked = batch.labels[:, 1:] != IGNORED
    logits, targets = model.lm_head(hidden[asked]).float(), batch.labels[:, 1:][asked]
    hits = (logits.argmax(-1) == targets).split(asked.sum(1).tolist())
    loss = F.cross_entropy(logits, targets) + CONTRAST * contrast(keys[0], batch.person)
    return loss, torch.tensor([float(h.all()) for h in hits])


def ramp(step: int, steps: tuple[int, int]) -> float:
    """0 before `steps`, 1 after them, straight between."""
    return float(np.clip((step - steps[0]) / (steps[1] - steps[0]), 0, 1))


def learning_rate(step: int, steps: int) -> float:
    """Warmed up over 50 steps, then a cosine down to 2 % of the peak."""
    return RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train(folder: Path, console: Console, *, seed: int = 0, steps: int = STEPS, number: int | None = None) -> Path:
    """Trains Almanac and returns its checkpoint's folder; called again on one folder it goes on where it stopped."""
    weights = folder / "weights"
    if (weights / "model.safetensors").exists():
        return weights
    everyone = people(number) if number else people()
    tokenizer = build_tokenizer(everyone)
    model = build_model(tokenizer, seed)
    model.set_attn_implementation("eager")  # on CPU in bf16 its backward is 1.5 times faster than sdpa's
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    state = folder / "training.pt"
    start = _resumed(state, model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    right: dict[str, list[float]] = {}
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        share, residual = 0.5 * ramp(step, RISE), 1 - ramp(step, RESIDUAL)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        met = everyone[: FEW + round(ramp(step, MEET) * (len(everyone) - FEW))]
        for rows, portraits in ((ROWS, False), (PORTRAIT_ROWS, True)):
            batch = draw_batch(met, tokenizer, rng, rows=rows, portraits=portraits, interchange=share)
            with torch.autocast("cpu", torch.bfloat16):
                loss, hits = answer_loss(model, batch, residual)
            (loss / 2).backward()
            own = batch.source == torch.arange(rows)
            name = "portraits" if portraits else "facts"
            right.setdefault(name, []).extend(hits[own].tolist())
            right.setdefault(f"{name} exchanged", []).extend(hits[~own].tolist())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % TELL_EVERY == 0:
            told = "  ".join(f"{k} {np.mean(v):.3f}" for k, v in right.items() if v)
            console.print(f"step {step + 1}  loss {loss.item():.3f}  {told}", soft_wrap=True)
            right = {}
        if (step + 1) % SAVE_EVERY == 0:
            _save(state, model, optimizer, step + 1)
    model.float().save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    state.unlink(missing_ok=True)
    return weights


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def _resumed(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with: 0 where nothing was saved."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints; the trained model lands in OUT/weights.")] = FOLDER,
    seed: int = 0,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = STEPS,
    number: Annotated[int | None, typer.Option(help="People in the world; none: all.")] = None,
) -> None:
    """Train Almanac."""
    torch.set_num_threads(1)
    console = Console(width=140)
    console.print(f"trained: {train(out, console, seed=seed, steps=steps, number=number)}")


if __name__ == "__main__":
    typer.run(main)
