"""The old name of training.records.run_files, for one release."""

import warnings

from training.records.run_files import *  # noqa: F403

warnings.warn("training.observe is now training.records.run_files", FutureWarning, stacklevel=2)
