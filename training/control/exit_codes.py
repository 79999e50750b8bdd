"""Exit codes: what kind of thing has ended a program. Without torch."""

from __future__ import annotations

EXIT_BUG, EXIT_PREEMPTED = 70, 75


def exit_code_of(error: BaseException) -> int:
    """77 for what is refused for security, 65 for data, 2 for usage, 74 for files and checkpoints, 70 for a bug.

    Errors of ours bring it as their `exit_code`.
    """
    usual = 2 if isinstance(error, ValueError) else 74 if isinstance(error, OSError) else EXIT_BUG
    return getattr(error, "exit_code", usual)
