"""What the editor computes from recorded states, computed plainly: hooks on the full model, one run a question.

Independent of what it checks: module paths are spelled out, and nothing is imported from `states`, `trace` or
`values`.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from errata.editor.model import EditableModel, Encoded

LAYERS = {
    "LlavaForConditionalGeneration": "model.language_model.layers",
    "LlamaForCausalLM": "model.layers",
    "GPT2LMHeadModel": "transformer.h",
}
ATTENTION = {"LlavaForConditionalGeneration": "self_attn", "LlamaForCausalLM": "self_attn", "GPT2LMHeadModel": "attn"}
DOWN = {"LlavaForConditionalGeneration": "down_proj", "LlamaForCausalLM": "down_proj", "GPT2LMHeadModel": "c_proj"}

Change = tuple[nn.Module, Callable[[Tensor], Tensor]]


def layer(model: EditableModel, index: int) -> nn.Module:
    return model.model.get_submodule(f"{LAYERS[type(model.model).__name__]}.{index}")


def down(model: EditableModel, index: int) -> nn.Module:
    return layer(model, index).mlp.get_submodule(DOWN[type(model.model).__name__])


def block(model: EditableModel, component: str, index: int) -> nn.Module:
    own = layer(model, index)
    names = {"mlp": "mlp", "attention": ATTENTION[type(model.model).__name__]}
    return own if component == "layer" else own.get_submodule(names[component])


def logits(model: EditableModel, row: Encoded, changes: Iterable[Change] = ()) -> Tensor:
    """The full model's logits at every token, with the outputs of some modules changed."""

    def changing(change: Callable[[Tensor], Tensor]) -> Callable[[object, object, object], object]:
        def hook(_module: object, _args: object, output: object) -> object:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for module, change in changes:
            hooks.callback(module.register_forward_hook(changing(change)).remove)
        return model.model(input_ids=row.ids[None], **row.vision, use_cache=False).logits[0].float()


def outputs(model: EditableModel, row: Encoded, components: Iterable[str]) -> dict[tuple[str, int], Tensor]:
    """The output of every block at every token, tokens × d."""
    found: dict[tuple[str, int], Tensor] = {}

    def keeping(name: tuple[str, int]) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            found[name] = output[0].clone()
            return output

        return keep

    sites = [(c, i) for c in components for i in range(len(model.layers))]
    logits(model, row, [(block(model, c, i), keeping((c, i))) for c, i in sites])
    return found


def keys(model: EditableModel, row: Encoded, index: int) -> Tensor:
    """The inputs of a down-projection at every token, tokens × m."""
    found: list[Tensor] = []
    handle = down(model, index).register_forward_pre_hook(lambda _module, args: found.append(args[0][0].clone()))
    with ExitStack() as hooks:
        hooks.callback(handle.remove)
        logits(model, row)
    return found[0]


def put(token: int, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Sets one token's state."""

    def change(output: Tensor) -> Tensor:
        output = output.clone()
        output[:, token] = value
        return output

    return change


def add(token: int, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds to one token's state."""
    return lambda output: output.index_add(1, torch.tensor([token]), value[None, None].expand(len(output), -1, -1))


def answer_log_probabilities(model: EditableModel, row: Encoded, changes: Iterable[Change] = ()) -> Tensor:
    """Log p of each of the answer's tokens, in float64."""
    at = logits(model, row, changes)[row.prompt_length - 1 : -1]
    return at.log_softmax(-1).gather(-1, row.answer[:, None])[:, 0].double()


def restored(
    model: EditableModel,
    clean: dict[tuple[str, int], Tensor],
    corrupted: Encoded,
    site: tuple[str, Iterable[int], int],
) -> tuple[float, float]:
    """The probabilities of the whole answer and of its first token with one site's clean states put back."""
    component, window, token = site
    changes = [(block(model, component, i), put(token, clean[component, i][token])) for i in window]
    chosen = answer_log_probabilities(model, corrupted, changes)
    return float(chosen.sum().exp()), float(chosen[0].exp())
