"""What every test needs: no network, and the same examples in every run."""

import os

# Read by transformers when it is imported, so it is set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

# A slow machine is no failure, and the gate gives one commit one answer.
settings.register_profile("gate", deadline=None, derandomize=True)
settings.load_profile("gate")
