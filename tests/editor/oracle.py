"""What the editor computes from recorded states, computed plainly: hooks on the full model, one run a question.

Independent of what it checks: module paths are spelled out, and nothing is imported from `recording`, `suffix`, `trace`
or `values`.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from errata.editor.model import EditableModel, Encoded

_LLAMA = ("model.layers", "self_attn", "mlp", "mlp.down_proj")
_SEEING = ("model.language_model.layers", *_LLAMA[1:])
_OTHERS = {
    "LlavaForConditionalGeneration": _SEEING,
    "LlavaNextForConditionalGeneration": _SEEING,
    "LlavaOnevisionForConditionalGeneration": _SEEING,
    "InternVLForConditionalGeneration": _SEEING,
    "Qwen2VLForConditionalGeneration": _SEEING,
    "Qwen2_5_VLForConditionalGeneration": _SEEING,
    "Qwen3VLForConditionalGeneration": _SEEING,
    "Gemma3ForConditionalGeneration": _SEEING,
    "PaliGemmaForConditionalGeneration": _SEEING,
    "Idefics3ForConditionalGeneration": ("model.text_model.layers", *_LLAMA[1:]),
    "SmolVLMForConditionalGeneration": ("model.text_model.layers", *_LLAMA[1:]),
    "GPT2LMHeadModel": ("transformer.h", "attn", "mlp", "mlp.c_proj"),
    "GPTJForCausalLM": ("transformer.h", "attn", "mlp", "mlp.fc_out"),
    "GPTNeoXForCausalLM": ("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h"),
    "OPTForCausalLM": ("model.decoder.layers", "self_attn", "fc2", "fc2"),
    "PhiForCausalLM": ("model.layers", "self_attn", "mlp", "mlp.fc2"),
}
"""Layers, and in each its attention, MLP and down-projection, where they are not Llama's."""

_GEMMA = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
JOINING = {"gemma2": _GEMMA, "gemma3_text": _GEMMA}
"""What joins the residual stream where it is not the block's own output, by the text model's type."""

Change = tuple[nn.Module, Callable[[Tensor], Tensor]]


def _paths(model: EditableModel) -> tuple[str, str, str, str]:
    return _OTHERS.get(type(model.model).__name__, _LLAMA)


def layer(model: EditableModel, index: int) -> nn.Module:
    return model.model.get_submodule(f"{_paths(model)[0]}.{index}")


def down(model: EditableModel, index: int) -> nn.Module:
    return layer(model, index).get_submodule(_paths(model)[3])


def block(model: EditableModel, component: str, index: int) -> nn.Module:
    own = layer(model, index)
    names = {"attention": _paths(model)[1], "mlp": _paths(model)[2]}
    return own if component == "layer" else own.get_submodule(names[component])


def joined(model: EditableModel, component: str, index: int) -> nn.Module:
    """The module whose output joins the residual stream."""
    names = JOINING.get(model.model.config.get_text_config().model_type, {})
    other = names.get(component)
    return layer(model, index).get_submodule(other) if other else block(model, component, index)


def logits(model: EditableModel, row: Encoded, changes: Iterable[Change] = ()) -> Tensor:
    """The full model's logits at every token, with the outputs of some modules changed."""

    def changing(change: Callable[[Tensor], Tensor]) -> Callable[[object, object, object], object]:
        def changed(state: Tensor) -> Tensor:
            return change(state.view(1, -1, state.shape[-1])).view(state.shape)

        def hook(_module: object, _args: object, output: object) -> object:
            return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for module, change in changes:
            hooks.callback(module.register_forward_hook(changing(change)).remove)
        return model.model(**model.inputs([row]), use_cache=False).logits[0].float()


def outputs(
    model: EditableModel, row: Encoded, components: Iterable[str], *, joining: bool = False
) -> dict[tuple[str, int], Tensor]:
    """The output of every block at every token, tokens × d; of what joins the stream where that is another module."""
    found: dict[tuple[str, int], Tensor] = {}

    def keeping(name: tuple[str, int]) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            found[name] = output[0].clone()
            return output

        return keep

    sites = [(c, i) for c in components for i in range(len(model.layers))]
    of = joined if joining else block
    logits(model, row, [(of(model, c, i), keeping((c, i))) for c, i in sites])
    return found


def inputs(model: EditableModel, row: Encoded) -> list[Tensor]:
    """The input of every layer at every token, tokens × d."""
    found: list[Tensor] = []

    def keep(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    with ExitStack() as hooks:
        for i in range(len(model.layers)):
            hooks.callback(layer(model, i).register_forward_pre_hook(keep, with_kwargs=True).remove)
        logits(model, row)
    return found


def keys(model: EditableModel, row: Encoded, index: int) -> Tensor:
    """The inputs of a down-projection at every token, tokens × m."""
    found: list[Tensor] = []
    handle = down(model, index).register_forward_pre_hook(
        lambda _module, args: found.append(args[0].reshape(-1, args[0].shape[-1]).clone())
    )
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
