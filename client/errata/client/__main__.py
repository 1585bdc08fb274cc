"""`python -m errata.client` is `errata`."""

import sys

from errata.client.cli import main

if __name__ == "__main__":
    sys.exit(main())
