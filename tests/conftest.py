"""What every test has: a start as from a terminal, also in the background of a shell, and rows to train on."""

import signal

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # such a shell has Ctrl-C ignored, which children inherit
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup has this one ignored


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from tests.small_world import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
