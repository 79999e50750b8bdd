"""Steers a run through its control.json, and says what it is doing:   python -m scripts.control runs/mine pause

The command is obeyed at the next step, by all processes together; --wait waits until it has been. Exit codes: 0 done,
1 not obeyed in time, 2 the run cannot obey that as it is, or there is no run (or a wrong flag), 74 its files cannot be
read or written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.control.requests import COMMANDS, PAUSE, RESUME, SAVE, STOP
from training.records.run_files import (
    UNDER_WAY,
    RunState,
    WrongStateError,
    newest_record,
    read_request,
    run_state,
    runs_beside,
    send_command,
)
from training.text import duration

NOT_IN_TIME = 1
LOOK_SECONDS = 0.1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.control", description=__doc__.split(":")[0] + ".", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run (--save_dir)")
    parser.add_argument("command", choices=(*COMMANDS, "status"))
    parser.add_argument("--wait", action="store_true", help="wait until the command has been obeyed")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="wait so many seconds (default 600)")
    parser.add_argument("--json", action="store_true", help="say it in JSON, for programs")
    return parser.parse_args(argv)


def sentence_of(run: Path, state: RunState, last: dict[str, Any]) -> str:
    """What a run is doing, for people; `last` is its newest record of training."""
    done = [f"{run}: {state.status}"]
    if state.exit_reason:
        done[0] += f" ({state.exit_reason})"
    if state.share is not None:
        epoch = f", epoch {state.epoch + 1}" if state.epoch is not None else ""
        done.append(f"step {state.step} of {state.total_steps} ({state.share:.0%}){epoch}")
    if isinstance(loss := last.get("train/loss"), float):
        done.append(f"loss {loss:.4f}")
    if state.status in ("running", "paused", "pausing") and isinstance(eta := last.get("eta_seconds"), float):
        done.append(f"{duration(eta)} to go" + (" once it runs" if state.status != "running" else ""))
    if state.status in (*UNDER_WAY, "stalled", "crashed"):
        done.append(f"process {state.pid} on {state.host}")
        if state.updated_at is not None:
            done.append(f"heard of {duration(time.time() - state.updated_at)} ago")
    return ", ".join(done)


def is_obeyed(run: Path, command: str, number: str, state: RunState) -> bool:
    """Whether a run has done what was asked; WrongStateError where it no longer can or will."""
    status, obeyed = state.status, state.obeyed or {}
    if command == STOP and status not in UNDER_WAY and status not in ("crashed", "stalled"):
        return True
    if command == SAVE and obeyed.get("id") == number:  # in the background it may take longer
        return (run / "checkpoints" / f"step-{obeyed['step']:08d}").is_dir()
    if (command == PAUSE and status == "paused") or (command == RESUME and status == "running"):
        return True
    newest = read_request(run)
    if newest is not None and newest.id != number:
        if command == SAVE and newest.command in (PAUSE, STOP):  # which save
            return is_obeyed(run, newest.command, newest.id, state)
        raise WrongStateError(f"{run} has been asked to {newest.command} since, and may not have obeyed {command}")
    if status not in UNDER_WAY or (command != STOP and status == "stopping"):
        raise WrongStateError(f"{run} is {status}, and has not obeyed")
    return False


def wait(run: Path, command: str, number: str, timeout: float) -> RunState:
    """The state of the run once it has obeyed. Raises TimeoutError, and what `is_obeyed` raises."""
    deadline = time.monotonic() + timeout
    while not is_obeyed(run, command, number, state := run_state(run)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run} is {state.status} and has not obeyed within {timeout:g} s")
        time.sleep(LOOK_SECONDS)
    return state


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    run, command = options.run, options.command
    try:
        if command == "status":
            state, last = run_state(run), newest_record(run)
            print(json.dumps({**asdict(state), "last": last}) if options.json else sentence_of(run, state, last))
            return 0
        number = send_command(run, command)
        answer: dict[str, Any] = {"id": number, "command": command}
        said = f"{run}: {command} is asked for, it comes with the next step"
        if options.wait:
            state = wait(run, command, number, options.timeout)
            answer, said = {**answer, "status": state.status}, sentence_of(run, state, {})
        print(json.dumps(answer) if options.json else said)
        return 0
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_IN_TIME
    except WrongStateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError:
        print(f"error: {runs_beside(run)}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 74


if __name__ == "__main__":
    sys.exit(main())
