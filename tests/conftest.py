"""What every test has: a start as from a terminal, also in the background of a shell, and rows to train on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

OLD = ["transformers==4.57.1", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]

signal.signal(signal.SIGINT, signal.default_int_handler)  # such a shell has Ctrl-C ignored, which children inherit
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup has this one ignored


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from tests.small_world import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def old_packages(tmp_path_factory) -> Path:
    """transformers 4 in a directory of its own; torch and the rest are those of this environment."""
    target = tmp_path_factory.mktemp("transformers4")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *OLD], check=True)
    return target
