"""What a model family says. Names and positions only: no family gets an algorithm of its own."""

from dataclasses import dataclass
from operator import attrgetter
from typing import cast

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """Where one family of `transformers` models keeps its decoder's parts, as dotted module paths.

    `architectures` are class names, as `config.architectures` spells them. `decoder` is the text decoder without its
    head, which takes `input_ids` and `position_ids`; `layers` and `final_norm` lie in it. `attention`, `mlp` and
    `down_projection` lie in a layer: the outputs of the first two join the residual stream, the down-projection is
    the MLP's last linear map, whose input is the key and whose output is the value. `attention_output` lies in a layer,
    too: the map W_O from the heads' joined outputs to the residual stream. `mlp_norm` is the norm, if a layer has it,
    that the MLP's output passes before it joins the stream; None where it joins as it is.

    `image_token` is the attribute of the config, dotted where it is a part's, that holds the id of one image token;
    None for text-only families.
    `answer_token_type` is the type of an answer's tokens where the model is told each token's type.
    """

    architectures: tuple[str, ...]
    decoder: str
    layers: str
    final_norm: str
    attention: str
    attention_output: str
    mlp: str
    down_projection: str
    mlp_norm: str | None = None
    image_token: str | None = None
    answer_token_type: int = 0

    def decoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """The text decoder without its head."""
        return cast(PreTrainedModel, model.get_submodule(self.decoder))

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder's layers, in order."""
        return cast(nn.ModuleList, self.decoder_of(model).get_submodule(self.layers))

    def final_norm_of(self, model: PreTrainedModel) -> nn.Module:
        """The norm between the last layer and the head."""
        return self.decoder_of(model).get_submodule(self.final_norm)

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether a model has all parts where this family says they are."""
        try:
            self.final_norm_of(model)
            for layer in self.layers_of(model):
                for part in (self.attention, self.attention_output, self.mlp, self.down_projection):
                    layer.get_submodule(part)
        except AttributeError:
            return False
        return True

    def normed_mlp(self, model: PreTrainedModel) -> bool:
        """Whether the MLP's output joins the residual stream through a norm, so that no value adds to another."""
        return self.mlp_norm is not None and hasattr(self.layers_of(model)[0], self.mlp_norm)

    def image_token_id(self, model: PreTrainedModel) -> int | None:
        """The id that stands for one image token after expansion; None for text-only families."""
        return None if self.image_token is None else int(attrgetter(self.image_token)(model.config))
