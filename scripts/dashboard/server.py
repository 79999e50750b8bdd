"""The routes: REST under /api/v1, a WebSocket per run, and the files of the page."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from scripts.dashboard import runs as files
from scripts.dashboard.follow import Tails, parse_position, read_since
from scripts.dashboard.history import MAX_POINTS
from scripts.dashboard.jobs import BusyError, FlagError, Jobs, Launcher, flag_table, torchrun
from scripts.dashboard.runs import Runs, UnknownRunError, clean
from scripts.dashboard.security import MAX_HEADER_BYTES, BoundedHttp, BoundedWebSocket, Gate
from scripts.dashboard.system import read_system
from training.control.requests import COMMANDS, RESUME, STOP
from training.records.run_files import WrongStateError, send_command

PAGE = Path(__file__).resolve().parent / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_RECORDS = 2000  # of one answer


def answer(value: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(clean(value), status)


@cache
def public_files() -> dict[str, tuple[bytes, str]]:
    """Path -> content and kind of what is answered without the token: the page, the charts, the table of flags."""
    own = [path for path in PAGE.iterdir() if path.suffix in KINDS]
    found = {f"/{path.name}": (path.read_bytes(), KINDS[path.suffix]) for path in own}
    found["/"] = found.pop("/index.html")
    package = find_spec("plotly")
    assert package is not None and package.origin is not None, "plotly is not installed"
    plotly = Path(package.origin).parent / "package_data" / "plotly.min.js"
    found["/plotly.min.js"] = (plotly.read_bytes(), "text/javascript")
    found["/flags.json"] = (json.dumps(flag_table(), allow_nan=False).encode(), "application/json")
    return found


@cache
def packed(path: str) -> tuple[bytes, str]:
    """The content of a public file as gzip, and a name of its version."""
    content, _ = public_files()[path]
    return gzip.compress(content, 6, mtime=0), f'"{hashlib.sha256(content).hexdigest()[:20]}"'


def serve_file(request: Request) -> Response:
    path = request.url.path
    content, kind = public_files()[path]
    small, version = packed(path)
    headers = {"cache-control": "no-cache", "etag": version, "vary": "accept-encoding"}
    if request.headers.get("if-none-match") == version:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["content-encoding"] = small, "gzip"
    return Response(content, headers=headers, media_type=f"{kind}; charset=utf-8")


def make_app(runs_dir: Path, launcher: Launcher = torchrun) -> FastAPI:
    """The app without its gate; `launcher(processes, flags)` gives the command of a run."""
    runs = Runs(runs_dir)
    jobs, tails = Jobs(runs, launcher), Tails()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(jobs))
        packing = asyncio.create_task(asyncio.to_thread(lambda: [packed(path) for path in public_files()]))
        yield
        await packing
        for task in (sweeper, *(task for _, task in tails.tails.values())):
            task.cancel()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    for path in public_files():
        app.add_api_route(path, serve_file, methods=["GET", "HEAD"], response_model=None)

    @app.exception_handler(UnknownRunError)
    async def unknown(_: Request, error: Exception) -> Response:
        return answer({"error": str(error)}, 404)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.get("/api/v1/runs")
    def list_runs() -> Response:
        return answer({"runs": [files.summary(path) for path in runs.all()], "runs_dir": str(runs_dir)})

    @app.post("/api/v1/runs")
    async def start_run(request: Request) -> Response:
        try:
            body = json.loads(await request.body() or b"{}")
        except (ValueError, RecursionError):
            return answer({"error": "the body is no JSON"}, 400)
        if not isinstance(body, dict):
            return answer({"error": "the body must be an object of flags"}, 400)
        try:
            run_id = await asyncio.to_thread(jobs.start, body)
        except FlagError as error:
            return answer({"errors": error.errors}, 422)
        except BusyError as error:
            return answer({"error": str(error)}, 409)
        except OSError as error:
            return answer({"error": f"the run could not be started: {error}"}, 500)
        return answer({"id": run_id}, 201)

    @app.get("/api/v1/runs/{run_id}")
    def show_run(run_id: str) -> Response:
        return answer(files.details(runs.find(run_id)))

    @app.get("/api/v1/runs/{run_id}/progress")
    def show_progress(run_id: str) -> Response:
        return answer(files.progress(runs.find(run_id)))

    @app.get("/api/v1/runs/{run_id}/metrics")
    async def show_metrics(run_id: str, request: Request) -> Response:
        run_dir = runs.find(run_id)
        since = request.query_params.get("since")
        if since is not None:
            wanted = parse_position(since)
            found = await asyncio.to_thread(read_since, run_dir, wanted, PAGE_RECORDS) if wanted else None
            if found:
                return answer(found)
        history, position = await tails.history(run_dir)
        snapshot = await asyncio.to_thread(history.snapshot, MAX_POINTS)
        return answer({**snapshot, "position": str(position), "reset": since is not None})

    @app.get("/api/v1/runs/{run_id}/report")
    def show_report(run_id: str) -> Response:
        found = files.report(runs.find(run_id))
        return answer(found) if found else answer({"error": "no report yet"}, 404)

    @app.get("/api/v1/runs/{run_id}/report/{name}")
    def show_image(run_id: str, name: str) -> Response:
        return Response(files.read_image(runs.find(run_id), name), media_type="image/png")

    @app.get("/api/v1/runs/{run_id}/log")
    def show_log(run_id: str, request: Request) -> Response:
        since = request.query_params.get("since", "")
        known = since.isascii() and since.isdigit() and len(since) < 16
        return answer(files.read_log(runs.find(run_id), int(since) if known else None))

    @app.get("/api/v1/runs/{run_id}/config")
    def show_config(run_id: str) -> Response:
        return answer(files.read_config(runs.find(run_id)))

    @app.get("/api/v1/system")
    def show_system() -> Response:
        return answer(read_system(runs.dir))

    def command_route(command: str) -> Callable[[str], Awaitable[Response]]:
        async def send(run_id: str) -> Response:
            return await asyncio.to_thread(_command, runs, jobs, run_id, command)

        return send

    for command in COMMANDS:
        app.add_api_route(f"/api/v1/runs/{{run_id}}/{command}", command_route(command), methods=["POST"])

    @app.websocket("/ws/runs/{run_id}")
    async def follow(websocket: WebSocket, run_id: str) -> None:
        try:
            run_dir = runs.find(run_id)
        except UnknownRunError:
            await websocket.close(4404)
            return
        await websocket.accept(websocket.scope["subprotocol"])
        messages = tails.get(run_dir).join(websocket.query_params.get("since"))
        sender = asyncio.create_task(_send_all(websocket, messages))
        try:
            await websocket.receive()  # clients say nothing; whatever comes is the end
        except WebSocketDisconnect:
            pass
        finally:
            sender.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await sender
            with suppress(RuntimeError, WebSocketDisconnect):
                await websocket.close(1000)

    return app


async def _sweep(jobs: Jobs) -> None:
    while True:
        await asyncio.sleep(1)
        jobs.reap()


async def _send_all(websocket: WebSocket, messages: AsyncIterator[str]) -> None:
    try:
        async for text in messages:
            await websocket.send_text(text)
        await websocket.close(1013)  # it has fallen behind and may come back with its position
    except (WebSocketDisconnect, RuntimeError):
        pass


def _command(runs: Runs, jobs: Jobs, run_id: str, command: str) -> Response:
    run_dir = runs.find(run_id)
    status = files.state_of(run_dir).status
    try:
        if command == RESUME and status in (*files.RESUMABLE, "stalled", "completed"):
            jobs.resume(run_dir)
            return answer({"id": run_id, "command": command, "started": True}, 202)
        if status == "pending" and command == STOP:
            jobs.stop_pending(run_dir)
            return answer({"id": run_id, "command": command, "signalled": True}, 202)
        if status == "pending":
            raise WrongStateError(f"{run_id} is pending, and {command} needs a run that has begun to train")
        number = send_command(run_dir, command)
    except (WrongStateError, BusyError) as error:
        return answer({"error": str(error).replace(str(run_dir), run_id), "status": status}, 409)
    except FileNotFoundError:
        return answer({"error": f"{run_id} has no state yet", "status": status}, 409)
    except (OSError, ValueError) as error:
        return answer({"error": str(error).replace(str(run_dir), run_id), "status": status}, 409)
    return answer({"id": run_id, "command": command, "request": number}, 202)


def make_server(
    runs_dir: Path, token: str, port: int, launcher: Launcher = torchrun
) -> tuple[uvicorn.Server, socket.socket]:
    """A server and the socket that it is to listen on, bound already, so that a taken port is told at once."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"port {port}: {error.strerror}; choose another with --port") from error
    port = listener.getsockname()[1]
    gate = Gate(make_app(runs_dir, launcher), token, port, public_files())
    config = uvicorn.Config(
        gate, http=BoundedHttp, ws=BoundedWebSocket, ws_max_size=4096, ws_per_message_deflate=False,
        ws_ping_interval=15, ws_ping_timeout=15, proxy_headers=False, server_header=False, access_log=False,
        log_level=logging.WARNING, timeout_keep_alive=10, timeout_graceful_shutdown=1, backlog=128,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES, lifespan="on", loop="asyncio",
    )  # fmt: skip
    return uvicorn.Server(config), listener
