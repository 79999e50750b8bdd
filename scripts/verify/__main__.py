"""`python -m scripts.verify`, which is checks.py."""

import sys

from scripts.verify.checks import main

if __name__ == "__main__":
    sys.exit(main())
