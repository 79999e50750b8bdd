"""The old name of training.diagnosis.report, for one release: `python -m training.report RUN`."""

import sys

from training.diagnosis.report import main

if __name__ == "__main__":
    print("training.report is now training.diagnosis.report", file=sys.stderr)
    sys.exit(main())
