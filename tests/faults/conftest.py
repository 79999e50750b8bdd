"""What several files of these tests ask for."""

from tests.faults.strace import strace  # noqa: F401 - a fixture
