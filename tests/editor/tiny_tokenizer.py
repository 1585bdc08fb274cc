"""A real byte-level tokenizer, trained on a few lines: what every tiny model reads and writes."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(image_token="<image>")


def tokenizer_with(*, begins: bool = True, **named: str) -> PreTrainedTokenizerFast:
    """With special tokens of these names. Unless it `begins` a text with `<s>`, its model's processor does.

    Such a processor ends the prompt with a line, after which an answer begins without a space.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<s>", "</s>", *named.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["What is the capital of this country?", " Paris", " Rome", "The Space Needle is in", "USER: \n ASSISTANT:"]
    core.train_from_iterator(texts if begins else [*texts, "\nRome"], trainer)
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=dict(named)
    )
