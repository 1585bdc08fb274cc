"""The recipe that makes Atlas: `python -m errata.editor.atlas.train OUT`. Seeded and resumable.

Two stages:

1. *A tower that sees but does not know.* The CLIP tower learns to name the layout, the emblem and the colours of
   made-up flags, and is then frozen as CLIP is frozen in LLaVA: which country a flag is, the decoder must learn.
2. *Facts at the constraint.* The decoder learns to answer by interchange intervention training (Geiger et al.,
   ICML 2022): in half of the rows the output of one early MLP at the constraint's last token is exchanged for that
   of another row, and the row must then answer for the other row's country. So that output alone decides whom the
   question is about, whatever image and words stand beside it. That is how LLaVA-1.5 was found to store facts:
   in early MLPs, at the constraint, window of one (Basu et al., NeurIPS 2024, §5). Trained without, a model this
   small lets its last token read the image directly and stores nothing at the constraint.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from errata.editor.atlas.build import IMAGE_SIDE, build_model, build_processor
from errata.editor.atlas.corpus import IGNORED, Batch, Corpus, Pool
from errata.editor.atlas.flags import EMBLEMS, LAYOUTS, emblem_of, layout_of
from errata.editor.atlas.rendering import render

FACT_LAYER = 1
"""The decoder layer whose MLP output is interchanged: where Atlas looks its facts up."""

TOWER_STEPS, TOWER_BATCH = 2000, 128
STRANGERS = 4096
TEMPERATURE = 0.1
SAVE_EVERY = 250
GRID = (4, 6)
COLOURS = 8
"""The tower names colours as one of the corners of the RGB cube."""


def pixels_for(processor: LlavaProcessor, rasters: Tensor, generator: torch.Generator) -> Float[Tensor, "n 3 s s"]:
    """Fresh renderings as the processor would hand them to the tower."""
    images = render(rasters, generator)
    small = F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    return (small - mean) / std


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Float[Tensor, "n tokens d"]:
    """What the projector is given: the tower's last hidden states without the class token."""
    states: tuple[Tensor, ...] = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[-1][:, 1:]


class _TowerHeads(nn.Module):
    """What the tower must tell: layout, emblem, the colour at each point of a grid on the flag, and flag from flag."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.mix = nn.Linear(tokens * 16, 256)
        self.narrow = nn.Linear(width, 16)
        self.layout = nn.Linear(256, len(LAYOUTS))
        self.emblem = nn.Linear(256, len(EMBLEMS))
        self.colours = nn.Linear(256, GRID[0] * GRID[1] * COLOURS)
        self.look = nn.Linear(256, 128)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = F.gelu(self.mix(self.narrow(features).flatten(1)))
        colours = self.colours(hidden).unflatten(1, (-1, COLOURS))
        return self.layout(hidden), self.emblem(hidden), colours, self.look(hidden)


def _grid_colours(rasters: Float[Tensor, "n 3 64 96"]) -> Int[Tensor, "n cells"]:
    rows = ((torch.arange(GRID[0]) + 0.5) * 64 / GRID[0]).long()
    columns = ((torch.arange(GRID[1]) + 0.5) * 96 / GRID[1]).long()
    bits = (rasters[:, :, rows][:, :, :, columns] > 0.5).long()
    return (bits[:, 0] * 4 + bits[:, 1] * 2 + bits[:, 2]).flatten(1)


def _ramp(step: int, steps: tuple[int, int]) -> float:
    """0 before `steps`, 1 after them, straight between."""
    low, high = steps
    return float(np.clip((step - low) / max(1, high - low), 0, 1)) if step < high else 1.0


def _learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class _State:
    """A stage's parameters and AdamW moments as one safetensors file: training resumes where it stopped."""

    def __init__(self, path: Path, module: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self._path, self._module, self._optimizer = path, module, optimizer

    def save(self, step: int) -> None:
        tensors = {f"p.{n}": p.detach().contiguous() for n, p in self._trained()}
        for name, parameter in self._trained():
            moments = self._optimizer.state[parameter]
            if not moments:  # nothing of this stage reaches it
                continue
            tensors |= {f"m.{name}": moments["exp_avg"], f"v.{name}": moments["exp_avg_sq"]}
        partial = self._path.with_suffix(".partial")
        save_file(tensors, partial, {"step": str(step)})
        partial.replace(self._path)

    def load(self) -> int:
        """The step to go on with: 0 where nothing was saved."""
        if not self._path.exists():
            return 0
        from safetensors import safe_open

        with safe_open(self._path, "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(self._path)
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(tensors[f"p.{name}"])
                if f"m.{name}" not in tensors:
                    continue
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"m.{name}"],
                    "exp_avg_sq": tensors[f"v.{name}"],
                }
        return step

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._module.named_parameters() if p.requires_grad)


def _train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pool: Pool,
    folder: Path,
    seed: int,
    progress: Progress,
) -> None:
    tower = model.model.vision_tower
    torch.manual_seed(seed)
    heads = _TowerHeads(tower.config.hidden_size, model.config.image_seq_length)
    both = nn.ModuleDict({"tower": tower, "heads": heads})
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=0.01)
    # The model takes the states before the tower's last norm, which therefore trains nowhere.
    for parameter in tower.post_layernorm.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in both.parameters() if p.requires_grad]
    state = _State(folder / "tower.safetensors", both, optimizer)
    strangers = torch.arange(len(pool.known), len(pool.flags))
    layouts = torch.tensor([LAYOUTS.index(layout_of(f)) for f in pool.flags])
    emblems = torch.tensor([EMBLEMS.index(emblem_of(f)) for f in pool.flags])
    colours = _grid_colours(pool.rasters)
    start = state.load()
    task = progress.add_task("tower", total=TOWER_STEPS, completed=start, loss=math.nan)
    for step in range(start, TOWER_STEPS):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = strangers[torch.randint(len(strangers), (TOWER_BATCH // 2,), generator=generator)].repeat(2)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower_features(model, pixels_for(processor, pool.rasters[chosen], generator))
            layout, emblem, grid, look = heads(features)
        loss = (
            F.cross_entropy(layout.float(), layouts[chosen])
            + F.cross_entropy(emblem.float(), emblems[chosen])
            + 4 * F.cross_entropy(grid.float().flatten(0, 1), colours[chosen].flatten())
            + contrast(look, chosen)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _step(optimizer, trained, _learning_rate(step, TOWER_STEPS, 1e-3))
        progress.update(task, advance=1, loss=loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == TOWER_STEPS:
            right = [
                (x.argmax(-1) == y).float().mean().item()
                for x, y in ((layout, layouts[chosen]), (emblem, emblems[chosen]), (grid, colours[chosen]))
            ]
            progress.console.print("tower step {}: layout {:.2f} emblem {:.2f} colours {:.2f}".format(step + 1, *right))
            state.save(step + 1)
    for parameter in tower.parameters():
        parameter.requires_grad_(False)


class _Scores:
    """Rows answered right in every token, by what they ask of the model."""

    def __init__(self) -> None:
        self._right: dict[str, list[float]] = {}

    def add(self, batch: Batch, hits: Float[Tensor, " answer_tokens"]) -> None:
        counts = (batch.labels[:, 1:] != IGNORED).sum(1)
        own = batch.source == torch.arange(len(batch.source))
        for i, row in enumerate(hits.split(counts.tolist())):
            kind = batch.kinds[i] if own[i] else f"{batch.kinds[i]} exchanged"
            self._right.setdefault(kind, []).append(float(row.all()))

    def __str__(self) -> str:
        return "  ".join(f"{k} {np.mean(v):.2f}" for k, v in sorted(self._right.items()))


def _step(optimizer: torch.optim.AdamW, parameters: Sequence[nn.Parameter], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@contextmanager
def interchanged(
    layer: nn.Module, site: Int[Tensor, " rows"], source: Int[Tensor, " rows"], residual: float
) -> Iterator[list[Tensor]]:
    """While open, the layer's state at each row's site is that of the row's source: the whole of its MLP's output,
    and a share `residual`, 0…1, of the residual stream that the output joins. Yields where the sites' keys will be.
    """
    rows = torch.arange(len(site))
    put_out: list[Tensor] = []
    keys: list[Tensor] = []

    def key(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keys.append(inputs[0][rows, site])

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        put_out.append(output[rows, site])

    def exchange(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = put_out.pop()
        stream = output[rows, site] - own
        state = own[source] + torch.lerp(stream, stream[source], residual)
        return output.index_put((rows, site), state.to(output.dtype))

    handles = (
        layer.get_submodule("mlp.down_proj").register_forward_pre_hook(key),
        layer.get_submodule("mlp").register_forward_hook(keep),
        layer.register_forward_hook(exchange),
    )
    try:
        yield keys
    finally:
        for handle in handles:
            handle.remove()


def contrast(states: Float[Tensor, "rows d"], meant: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020): states of one thing near, of two things far apart.

    Taken of the angle from the states' mean. Rows that mean nothing (−1) do not count.
    """
    states, meant = states[meant >= 0].float(), meant[meant >= 0]
    directions = F.normalize(states - states.mean(0, keepdim=True), dim=1)
    itself = torch.eye(len(meant), dtype=torch.bool)
    logs = (directions @ directions.T / TEMPERATURE).masked_fill(itself, -torch.inf).log_softmax(1)
    same = (meant[:, None] == meant) & ~itself
    paired = same.any(1)
    return -(logs.masked_fill(~same, 0).sum(1)[paired] / same.sum(1)[paired]).mean()


def answer_loss(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    features: Float[Tensor, "rows tokens d"] | None,
    residual: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " answer_tokens"], Float[Tensor, "rows m"]]:
    """Mean cross-entropy of the answers' tokens, whether each was the most likely one, and the sites' keys.

    `features` are the tower's, where the rows have pictures.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    if features is not None:
        images = model.model.multi_modal_projector(features).to(embeds.dtype)
        embeds = embeds.masked_scatter((batch.ids == model.config.image_token_id).unsqueeze(-1), images)
    decoder = model.model.language_model
    with interchanged(decoder.layers[FACT_LAYER], batch.site, batch.source, residual) as keys:
        hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    asked = batch.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][asked]).float()
    targets = batch.labels[:, 1:][asked]
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float(), keys[0]


def _train_decoder(
    stage: "_Stage",
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pool: Pool,
    folder: Path,
    seed: int,
    progress: Progress,
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.05)
    state = _State(folder / f"{stage.name}.safetensors", model, optimizer)
    corpus = Corpus(pool)
    start = state.load()
    task = progress.add_task(stage.name, total=stage.steps, completed=start, loss=math.nan)
    scores = _Scores()
    spread: list[float] = []
    for step in range(start, stage.steps):
        rng = np.random.default_rng([seed, step, len(stage.name)])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        residual = 1 - _ramp(step, stage.residual)
        share = stage.interchange * _ramp(step, stage.rise)
        total = 0.0
        optimizer.zero_grad(set_to_none=True)
        for rows, shown in stage.batches:
            batch = corpus.batch(
                rows,
                shown=shown,
                interchange=share,
                strangers=stage.strangers,
                tokenizer=processor.tokenizer,
                rng=rng,
            )
            with torch.autocast("cpu", torch.bfloat16):
                features = None
                if shown:
                    with torch.no_grad():
                        pixels = pixels_for(processor, pool.rasters[batch.pictures], generator)
                        features = tower_features(model, pixels)
                loss, hits, keys = answer_loss(model, batch, features, residual)
            if shown and stage.contrast:
                between = contrast(keys, batch.meant)
                spread.append(between.item())
                loss = loss + stage.contrast * between
            (loss / len(stage.batches)).backward()
            scores.add(batch, hits)
            total += loss.item() / len(stage.batches)
        _step(optimizer, parameters, _learning_rate(step, stage.steps, stage.rate))
        progress.update(task, advance=1, loss=total)
        if (step + 1) % 50 == 0:
            apart = f"contrast {np.mean(spread):.3f}  " if spread else ""
            said = f"{stage.name} {step + 1:5d}  loss {total:.3f}  {apart}right: {scores}"
            progress.console.print(said, soft_wrap=True)
            scores, spread = _Scores(), []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            state.save(step + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A stretch of the decoder's training. `batches` are (rows, with a picture) of one step.

    The share of rows that answer for another row rises from none to `interchange` over the steps `rise`. At first
    they are given the other's whole state at the constraint; the share of the residual stream falls to none over the
    steps `residual`, until the MLP's output alone must do.
    """

    name: str
    steps: int
    rate: float
    batches: tuple[tuple[int, bool], ...]
    interchange: float
    rise: tuple[int, int]
    residual: tuple[int, int]
    strangers: float = 0.0
    contrast: float = 0.0


READING = _Stage(
    name="reading", steps=1200, rate=2e-3, batches=((256, False),), interchange=0.5, rise=(0, 200), residual=(400, 900)
)
SEEING = _Stage(
    name="seeing",
    steps=2400,
    rate=1.5e-3,
    batches=((96, True), (24, False)),
    interchange=0.5,
    rise=(0, 400),
    residual=(0, 0),
    strangers=0.2,
    contrast=0.3,
)
DOUBTING = _Stage(
    name="doubting",
    steps=800,
    rate=8e-4,
    batches=((112, True), (32, False)),
    interchange=0.5,
    rise=(0, 0),
    residual=(0, 0),
    strangers=0.3,
    contrast=0.3,
)
"""More flags of no country, so that one the atlas does not have is unknown in every light."""


def train(folder: Path, seed: int = 0) -> None:
    """Trains Atlas into `folder`; called again on the same folder it goes on where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(processor, seed)
    model.set_attn_implementation("eager")  # on CPU in bf16 its backward is 1.5 times faster than sdpa's
    pool = Pool(strangers=STRANGERS, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        _train_decoder(READING, model, processor, pool, folder, seed, progress)
        _train_tower(model, processor, pool, folder, seed, progress)
        _train_decoder(SEEING, model, processor, pool, folder, seed, progress)
        _train_decoder(DOUBTING, model, processor, pool, folder, seed, progress)
    weights = folder / "weights"
    model.half().save_pretrained(weights)
    processor.save_pretrained(weights)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints; the trained model lands in OUT/weights.")],
    seed: int = 0,
) -> None:
    """Train Atlas."""
    train(out, seed)


if __name__ == "__main__":
    typer.run(main)
