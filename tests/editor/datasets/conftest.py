"""The folders of tests are no packages; `sets` is imported by name from here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
