"""What every test needs: no network, the same examples in every run, and processes that hear Ctrl-C."""

import os
import signal

# Read by transformers when it is imported, so it is set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure, and the gate gives one commit one answer.
settings.register_profile("gate", deadline=None, derandomize=True)
settings.load_profile("gate")
