"""LLaVA-1.5: `LlavaForConditionalGeneration`, a CLIP tower and a Llama decoder."""

from transformers import PreTrainedModel

from errata.editor.families.llama import Llama


class Llava(Llama):
    """Module tree:

        LlavaForConditionalGeneration
        ├── model
        │   ├── vision_tower, multi_modal_projector
        │   └── language_model        as Llama's `model`
        └── lm_head

    The processor expands each `<image>` of the prompt to as many image tokens as the tower has patches.
    """

    architectures = ("LlavaForConditionalGeneration",)

    def decoder(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.model.language_model

    def image_token_id(self, model: PreTrainedModel) -> int | None:
        return int(model.config.image_token_id)
