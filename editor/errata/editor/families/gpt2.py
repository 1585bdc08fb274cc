"""GPT-2: `GPT2LMHeadModel`, whose linear maps are `Conv1D` (weights stored transposed)."""

from torch import nn
from transformers import PreTrainedModel

from errata.editor.families.base import ModelFamily


class GPT2(ModelFamily):
    """Module tree:

        GPT2LMHeadModel
        ├── transformer
        │   ├── wte, wpe
        │   ├── h[i]
        │   │   ├── attn
        │   │   └── mlp (c_fc, c_proj)
        │   └── ln_f
        └── lm_head
    """

    architectures = ("GPT2LMHeadModel",)

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.transformer

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return self.decoder(model).h

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).ln_f

    def attention(self, layer: nn.Module) -> nn.Module:
        return layer.attn

    def mlp(self, layer: nn.Module) -> nn.Module:
        return layer.mlp

    def down_projection(self, layer: nn.Module) -> nn.Module:
        return layer.mlp.c_proj
