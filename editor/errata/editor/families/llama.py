"""Llama: `LlamaForCausalLM`."""

from torch import nn
from transformers import PreTrainedModel

from errata.editor.families.base import ModelFamily


class Llama(ModelFamily):
    """Module tree:

        LlamaForCausalLM
        ├── model
        │   ├── embed_tokens
        │   ├── layers[i]
        │   │   ├── self_attn
        │   │   └── mlp (gate_proj, up_proj, down_proj)
        │   └── norm
        └── lm_head
    """

    architectures = ("LlamaForCausalLM",)

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.model

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return self.decoder(model).layers

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).norm

    def attention(self, layer: nn.Module) -> nn.Module:
        return layer.self_attn

    def mlp(self, layer: nn.Module) -> nn.Module:
        return layer.mlp

    def down_projection(self, layer: nn.Module) -> nn.Module:
        return layer.mlp.down_proj
