"""Locate, correct and insert facts in multimodal and text language models in closed form."""

import logging

# PEFT imports bitsandbytes wherever that is installed, which then warns of a faster kernel that there is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
