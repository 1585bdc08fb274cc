"""Where the suite's processors are not the checkpoint's own, they do the same for images."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from tiny import picture, tiny_model
from tiny_phi4 import SIDE, SquareImages, image_processor

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


@needs_torchvision
@pytest.mark.parametrize("side", [24, 37, SIDE])
def test_the_stand_in_for_phi_4s_image_processor_makes_what_that_makes(side: int) -> None:
    images = [picture(seed).resize((side, side)) for seed in range(2)]
    theirs, ours = image_processor()(images=images, return_tensors="pt"), SquareImages()(images=images)
    assert theirs.keys() == ours.keys()
    for name, found in theirs.items():
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(ours[name]), rtol=0, atol=1e-6)


@needs_torchvision
@pytest.mark.skipif(find_spec("num2words") is None, reason="num2words is not installed")
@pytest.mark.parametrize("size", [(24, 24), (37, 29), (60, 20)])
def test_smolvlms_processor_makes_of_an_image_what_that_of_idefics3_makes(size: tuple[int, int]) -> None:
    stand_in = tiny_model("smolvlm").processor
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessorPil(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
        ),
        tokenizer=stand_in.tokenizer,
        video_processor=transformers.SmolVLMVideoProcessor(),
        image_seq_len=9,
        chat_template=stand_in.chat_template,
    )
    given = {"text": ["<image>What is this?"], "images": [picture().resize(size)], "return_tensors": "pt"}
    theirs, ours = processor(**given), stand_in(**given)
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].equal(ours[name]) for name in theirs)
