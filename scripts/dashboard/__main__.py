"""Serve the dashboard on this machine: `python -m scripts.dashboard --runs_dir runs --port 8765`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.dashboard.security import make_token
from scripts.dashboard.server import make_server


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.dashboard", description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs_dir", default="runs", metavar="DIR", help="directory of the runs (default runs)")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="port on 127.0.0.1 (default 8765)")
    given = parser.parse_args(argv)
    if not 1 <= given.port <= 65535:
        parser.error(f"--port {given.port}: not between 1 and 65535")
    runs_dir = Path(given.runs_dir)
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        token = make_token(runs_dir)
        server, listener = make_server(runs_dir, token, given.port)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the runs of {runs_dir} are at\n\n    http://127.0.0.1:{given.port}/#token={token}\n")
    print("Whoever has this address can start and stop runs. Ctrl-C ends the page; runs go on.", flush=True)
    server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
