"""Mixed versions in one batch, against the base alone and PEFT's mixed adapters: `python benchmarks/serving.py`.

An untrained Llama of realistic shape serves rank-8 edits of some layers. Every answer is compared with that of its
version alone before anything is timed. Two figures, both interleaved in an order that changes: single decoding steps of
batches that stand side by side, and whole answers, prompts and queue included. Medians with quartiles. `--quick` only
shows that it runs.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any, cast

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from errata.editor.atlas.world import COUNTRIES
from errata.editor.checkpoints import ATLAS, hash_tensors, load_model
from errata.editor.delta import Delta, LowRank, applied
from errata.editor.families import family_of
from errata.editor.mixed import MixedDeltas, replica, version_factors
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt
from errata.server.engine import Engine, EngineSettings, Generation
from errata.server.engine.batch import Row, RunningBatch


def untrained(width: int, layers: int) -> EditableModel:
    """A Llama with Atlas's tokenizer."""
    tokenizer = load_model(ATLAS).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return EditableModel(
        name="untrained",
        model=model,
        processor=tokenizer,
        family=family_of(model),
        base_sha256=hash_tensors(model.state_dict().items()),
    )


def edits(model: EditableModel, versions: int, layers: Sequence[int], rank: int) -> dict[int, list[Delta]]:
    """The base and random edits of it, large enough to change answers."""
    found: dict[int, list[Delta]] = {0: []}
    for version in range(1, versions + 1):
        random = torch.Generator().manual_seed(version)
        d, m = model.model.config.hidden_size, model.model.config.intermediate_size
        lows = {
            i: LowRank(a=torch.randn(rank, m, generator=random) * 0.05, b=torch.randn(d, rank, generator=random) * 0.1)
            for i in layers
        }
        names = {i: model.down_projection_name(i) for i in layers}
        found[version] = [Delta(base_sha256=model.base_sha256, layers=lows, modules=names)]
    return found


def prompts(model: EditableModel, rows: int) -> list[Prompt]:
    """Questions of one length: PEFT's batch would have to pad others."""
    by_length: dict[int, list[Prompt]] = defaultdict(list)
    for country in COUNTRIES:
        prompt = Prompt(text=f"What is the capital of {country.name}? " * 4, chat=False)
        by_length[len(model.encode(prompt).ids)].append(prompt)
    found = max(by_length.values(), key=len)
    return [found[i % len(found)] for i in range(rows)]


def through_engine(
    engine: Engine, asked: Sequence[Prompt], versions: Sequence[int], tokens: int
) -> tuple[float, list[str]]:
    """Tokens a second, and the answers."""
    began = time.perf_counter()
    handles = [
        engine.generate(Generation(version=v, prompt=p, max_new_tokens=tokens))
        for p, v in zip(asked, versions, strict=True)
    ]
    answers = [h.result() for h in handles]
    total = sum(a.generated_tokens for a in answers)
    return total / (time.perf_counter() - began), [a.text for a in answers]


def through_peft(
    model: EditableModel, adapted: PeftModel, asked: Sequence[Prompt], versions: Sequence[int], tokens: int
) -> tuple[float, list[str]]:
    """The same with PEFT's `adapter_names`."""
    began = time.perf_counter()
    inputs = model.inputs([model.encode(p) for p in asked])
    with torch.inference_mode():
        out = cast(Any, adapted).generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            adapter_names=names_of(versions),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=model.end_token_id,
            pad_token_id=model.end_token_id,
        )[:, inputs["input_ids"].shape[1] :]
    answers = [model.answer_of(row) for row in out.tolist()]
    total = sum(len(a.tokens) + a.finished for a in answers)
    return total / (time.perf_counter() - began), [a.text for a in answers]


def with_adapters(model: EditableModel, lineages: dict[int, list[Delta]]) -> PeftModel:
    """Every version as an adapter on one copy of the weights."""
    base: Any = replica(model).model
    adapted: PeftModel | None = None
    with tempfile.TemporaryDirectory() as folder:
        for version, (delta,) in ((v, ds) for v, ds in lineages.items() if ds):
            path = Path(folder) / str(version)
            delta.save(path)
            if adapted is None:
                adapted = PeftModel.from_pretrained(base, str(path), adapter_name=f"v{version}")
            else:
                adapted.load_adapter(str(path), adapter_name=f"v{version}")
    assert adapted is not None
    return adapted.eval()


def check(
    model: EditableModel,
    lineages: dict[int, list[Delta]],
    asked: Sequence[Prompt],
    versions: Sequence[int],
    tokens: int,
    answers: Sequence[str],
) -> None:
    """Every answer is that of its version alone."""
    for version in set(versions):
        rows = [i for i, v in enumerate(versions) if v == version]
        with applied(model, *lineages[version]):
            alone = model.generate([asked[i] for i in rows], max_new_tokens=tokens)
        for i, answer in zip(rows, alone, strict=True):
            assert answers[i] == answer.text, f"version {version}: {answers[i]!r} instead of {answer.text!r}"


def names_of(versions: Sequence[int]) -> list[str]:
    """Versions as PEFT's adapters are named."""
    return [f"v{v}" if v else "__base__" for v in versions]


def engine_steps(
    model: EditableModel, deltas: MixedDeltas, lineages: dict[int, list[Delta]], asked: Sequence[Prompt],
    versions: Sequence[int],
) -> Callable[[], object]:  # fmt: skip
    """The decoding step of a batch as the engine runs it."""
    factors = {v: version_factors(model, lineages[v]) for v in set(versions)}
    batch = RunningBatch(model, deltas)
    rows = [
        Row(encoded=model.encode(p), version=factors[v] if v else None, sampling=None)
        for p, v in zip(asked, versions, strict=True)
    ]
    batch.join(batch.prefill(rows), range(len(rows)))
    return batch.step


def peft_steps(
    model: EditableModel, adapted: PeftModel, asked: Sequence[Prompt], versions: Sequence[int]
) -> Callable[[], object]:
    """The bare decoding step with PEFT's `adapter_names`: a forward pass and the likeliest tokens."""
    cache = DynamicCache(config=model.model.config)
    names = names_of(versions)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        out = adapted(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=names)
        tokens: torch.Tensor = out.logits[:, -1].argmax(-1)
        return tokens

    last = [forward(model.inputs([model.encode(p) for p in asked])["input_ids"])]

    def step() -> object:
        last[0] = forward(last[0][:, None])
        return last[0].tolist()

    return step


def interleaved(measured: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measured in each round; every round begins with another."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    names = list(measured)
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            found[name].append(measured[name]())
    return found


def timed(clock: Callable[[], float], step: Callable[[], object]) -> float:
    """Seconds that it took."""
    began = clock()
    step()
    return clock() - began


def table(title: str, rows: int, steps: dict[str, list[float]], whole: dict[str, list[float]]) -> Table:
    """Medians and quartiles; ratios are medians of pairs that were measured one after the other."""
    shown = Table("batch", "ms a step", "decoding tokens/s", "/ base", "tokens/s in all", "/ base", title=title)

    def cell(values: Sequence[float], digits: int = 0) -> str:
        low, middle, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"

    base_steps, base_whole = next(iter(steps.values())), next(iter(whole.values()))
    for name, seconds in steps.items():
        shown.add_row(
            name,
            cell([1000 * s for s in seconds]),
            cell([rows / s for s in seconds]),
            cell([b / s for b, s in zip(base_steps, seconds, strict=True)], 2),
            cell(whole[name]),
            cell([s / b for b, s in zip(base_whole, whole[name], strict=True)], 2),
        )
    return shown


def main(
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to generate a row.")] = 16,
    rounds: Annotated[int, typer.Option(help="Times everything is run.")] = 5,
    width: Annotated[int, typer.Option(help="Width of the model, a multiple of 64.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 12,
    edited: Annotated[int, typer.Option(help="Layers that each edit changes.")] = 3,
    rank: Annotated[int, typer.Option(help="Rank of each edit.")] = 8,
    peft: Annotated[bool, typer.Option(help="Compare with PEFT as well.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the figures as JSON.")] = Path("benchmarks/results"),
    cpu_time: Annotated[
        bool, typer.Option(help="Time steps by the thread's CPU time: for a busy machine, with OMP_NUM_THREADS=1.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="One round of a small model: shows only that it runs.")] = False,
) -> None:
    """Compare batches of 1, 8 and `rows` versions with the base alone and with PEFT."""
    if quick:
        rows, tokens, rounds, width, layers = 8, 4, 1, 128, 4
    console = Console(width=120)
    clock = time.thread_time if cpu_time else time.perf_counter
    model = untrained(width, layers)
    lineages = edits(model, rows, range(1, 1 + edited), rank)
    asked = prompts(model, rows)
    engine = Engine(model, lineages.__getitem__, EngineSettings(max_rows=rows))
    engine.start()
    batches = {"base alone": [0] * rows}
    batches |= {f"{n} version(s) mixed": [1 + i % n for i in range(rows)] for n in sorted({1, min(8, rows), rows})}
    whole: dict[str, Callable[[], tuple[float, list[str]]]] = {
        name: partial(through_engine, engine, asked, versions, tokens) for name, versions in batches.items()
    }
    with MixedDeltas(model) as deltas, torch.inference_mode():
        single = {name: engine_steps(model, deltas, lineages, asked, versions) for name, versions in batches.items()}
        if peft:
            name = f"{rows} adapters of PEFT"
            batches[name] = [1 + i for i in range(rows)]
            adapted = with_adapters(model, lineages)
            whole[name] = partial(through_peft, model, adapted, asked, batches[name], tokens)
            single[name] = peft_steps(model, adapted, asked, batches[name])
        found_steps = interleaved({name: partial(timed, clock, step) for name, step in single.items()}, rounds * tokens)
    for name, run in whole.items():
        check(model, lineages, asked, batches[name], tokens, run()[1])
    console.print("every answer is that of its version alone")
    found_whole = interleaved({name: lambda run=run: run()[0] for name, run in whole.items()}, rounds)  # type: ignore[misc]
    engine.close()
    parameters = sum(p.numel() for p in model.model.parameters())
    title = f"{rows} rows × {tokens} tokens, {parameters / 1e6:.0f} M parameters, rank {rank} at {edited} layers"
    console.print(table(title, rows, found_steps, found_whole))
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("serving-quick.json" if quick else "serving.json")
    about = {"rows": rows, "tokens": tokens, "parameters": parameters, "rank": rank, "edited": edited}
    found = {
        **about,
        "threads": torch.get_num_threads(),
        "cpu_time": cpu_time,
        "step_seconds": found_steps,
        "tokens_per_second": found_whole,
    }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(f"figures in {path}")


if __name__ == "__main__":
    typer.run(main)
