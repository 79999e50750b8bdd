"""`python -m scripts.templates`, which is table.py."""

import sys

from scripts.templates.table import main

if __name__ == "__main__":
    sys.exit(main())
