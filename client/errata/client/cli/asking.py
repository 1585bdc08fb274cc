"""Questions to a version."""

import math
from pathlib import Path
from typing import Annotated

import typer

from errata.client.cli.output import Output, line
from errata.client.cli.plain import clean, short
from errata.client.cli.session import Session
from errata.client.inputs import Prompt, SamplingOptions
from errata.client.results import Generation
from errata.client.streams import TextStream

PromptText = Annotated[str, typer.Argument(metavar="PROMPT", help="The question.")]
Images = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture; may be repeated.")]
Asked = Annotated[
    str | None, typer.Option("--version", metavar="VERSION", help="atlas@3, candidate; default: the champion.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Without the model's chat template.")]


def ask(
    session: Session,
    prompt: PromptText,
    version: Asked = None,
    image: Images = None,
    raw: Raw = False,
    candidate: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="How likely is this answer? Repeat it.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest answer; default 32.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="Default 0: always the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Sample from so much of the mass.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Sample from the K likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Repeat a sampled answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends the answer; may be repeated.")] = None,
) -> None:
    """Ask a version one question; the answer appears as it grows."""
    asked = session.version(version)
    question = Prompt(prompt, image or (), raw=raw)
    if candidate:
        _score(session, asked, question, candidate)
        return
    options: SamplingOptions = {}
    if max_tokens is not None:
        options["max_new_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if top_k is not None:
        options["top_k"] = top_k
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    with session.client.stream(asked, question, **options) as stream:
        answer = stream.result() if session.output.as_json else _spoken(stream, session.output)
    if session.output.as_json:
        session.output.document(answer)


def _spoken(stream: TextStream, output: Output) -> Generation:
    for piece in stream:
        output.console.print(clean(piece), end="", soft_wrap=True)
        output.console.file.flush()
    output.console.print()
    answer = stream.result()
    if output.verbose:
        seed = "" if answer.seed is None else f", seed {answer.seed}"
        output.note(
            f"{short(answer.version)}, {answer.generated_tokens} tokens ({answer.finish_reason}), "
            f"log p {answer.log_probability:.3f}, risk {answer.risk:.3f}{seed}"
        )
    return answer


def _score(session: Session, version: str, prompt: Prompt, candidates: list[str]) -> None:
    scores = session.client.score(version, prompt, candidates)
    ranked = sorted(scores.candidates, key=lambda each: -each.log_probability)
    rows = ((each.candidate, f"{math.exp(each.log_probability):.4f}", str(each.tokens)) for each in ranked)
    table = session.output.table(("answer", "p", "tokens"), rows)
    session.output.show(scores, table, line(f"asked: {short(scores.version)}", "dim"))
