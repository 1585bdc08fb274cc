"""What a model family must say. Names and positions only: no family gets an algorithm of its own."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel


class ModelFamily(ABC):
    """Where one family of `transformers` models keeps its decoder's parts."""

    architectures: ClassVar[tuple[str, ...]]
    """Class names in `transformers`, as `config.architectures` spells them."""

    @abstractmethod
    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The text decoder without its head: takes `input_ids` and `position_ids`."""

    @abstractmethod
    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder's layers, in order."""

    @abstractmethod
    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """The norm between the last layer and the head."""

    @abstractmethod
    def attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention block of a layer; its first output is what joins the residual stream."""

    @abstractmethod
    def mlp(self, layer: nn.Module) -> nn.Module:
        """The MLP block of a layer; its output is what joins the residual stream."""

    @abstractmethod
    def down_projection(self, layer: nn.Module) -> nn.Module:
        """The MLP's last linear map, `nn.Linear` or GPT-2's `Conv1D`: its input is the key, its output the value."""

    def image_token_id(self, model: PreTrainedModel) -> int | None:
        """The id that stands for one image token after expansion; None for text-only families."""
        return None
