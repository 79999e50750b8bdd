"""Hostile requests to the dashboard: every one is refused, tells nothing, and changes nothing."""

import json
import os
import socket
import stat
import time

import pytest
from websockets.exceptions import InvalidHandshake
from websockets.sync.client import connect

from scripts.dashboard import security
from tests.dashboard_world import make_run, record, served, write_records

SECRET = "canary-7316"
JSON_TYPE = "Content-Type: application/json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("place")
    (directory / "outside").mkdir()
    make_run(directory / "outside", "secret-run", status="stopped")
    (directory / "outside" / "passwords.txt").write_text(SECRET)
    with served(directory / "runs") as place:
        run = make_run(place.runs_dir, "run")
        write_records(run, [record(1, note=SECRET)], "a")
        (place.runs_dir / "linked").symlink_to(directory / "outside" / "secret-run")
        (place.runs_dir / "up").symlink_to("..")
        odd = make_run(place.runs_dir, "odd", status="stopped")
        (odd / "log.txt").symlink_to(directory / "outside" / "passwords.txt")
        (odd / "alerts.jsonl").symlink_to(directory / "outside" / "passwords.txt")
        (odd / "data_report.json").symlink_to(directory / "outside" / "passwords.txt")
        (odd / "report").symlink_to(directory / "outside")
        (odd / "metrics.jsonl").unlink()
        (odd / "metrics.jsonl").symlink_to(run / "metrics.jsonl")
        (odd / "config.yaml").unlink()
        os.mkfifo(odd / "config.yaml")
        yield place


def tree(directory):
    """Everything below a directory: names, sizes, times, kinds."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture(autouse=True)
def nothing_changes(place):
    before = tree(place.runs_dir.parent)
    yield
    assert tree(place.runs_dir.parent) == before


def talk(place, request, body=b"", seconds=8):
    """What the server answers to these bytes, until it ends the connection or falls silent."""
    with socket.create_connection(("127.0.0.1", place.port), timeout=seconds) as line:
        line.sendall(request if isinstance(request, bytes) else request.encode())
        heard = b""
        try:
            if body:
                line.sendall(body)
            while chunk := line.recv(65536):
                heard += chunk
        except (TimeoutError, ConnectionError):
            pass
        return heard.decode("latin-1")


def ask(place, method="GET", path="/api/v1/runs", *headers, host=None, token=True, body=b""):
    lines = [f"{method} {path} HTTP/1.1"]
    if host is not False:
        lines.append(f"Host: {host or f'127.0.0.1:{place.port}'}")
    if token:
        lines.append(f"Authorization: Bearer {place.token if token is True else token}")
    lines += [*headers, "Connection: close"]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return talk(place, "\r\n".join(lines) + "\r\n\r\n", body)


def status_of(answer):
    return int(answer.split(" ", 2)[1]) if answer.startswith("HTTP/1.1 ") else 0


def assert_refused(answer, *codes):
    assert status_of(answer) in (codes or (400, 401, 403, 404, 405, 413, 415)), answer[:300]
    assert SECRET not in answer and "train/loss" not in answer


PRIVATE = [
    "/api/v1/runs", "/api/v1/runs/run", "/api/v1/runs/run/progress", "/api/v1/runs/run/metrics",
    "/api/v1/runs/run/report", "/api/v1/runs/run/log", "/api/v1/runs/run/config", "/api/v1/system",
    "/api/v1/runs/run/pause", "/api/v1/runs/run/resume", "/api/v1/runs/run/save", "/api/v1/runs/run/stop",
    "/docs", "/redoc", "/openapi.json", "/.token", "/runs/.token", "/index.html", "/nothing", "/api", "/ws/runs/run",
]  # fmt: skip
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]


@pytest.mark.parametrize("method", METHODS)
def test_no_method_on_any_path_is_answered_without_the_token(place, method):
    for path in PRIVATE:
        assert_refused(ask(place, method, path, token=False), 401)
    if method not in ("GET", "HEAD"):
        for path in ("/", "/app.js", "/plotly.min.js", "/flags.json"):
            assert_refused(ask(place, method, path, token=False), 401)


@pytest.mark.parametrize(
    "token", ["x", "", " ", "Bearer", "null", "undefined", "A" * 43, "A" * 10_000, "../.token", "é", "%00"]
)
def test_a_wrong_token_is_refused(place, token):
    assert_refused(ask(place, token=token or " ", path="/api/v1/runs"), 401)
    assert_refused(ask(place, "POST", "/api/v1/runs/run/stop", token=token or " "), 401)


def test_half_a_token_a_second_one_or_another_place_for_it_is_refused(place):
    right = place.token
    for wrong in (right[:-1], right + "x", right.lower(), right.upper(), right[::-1]):
        assert_refused(ask(place, token=wrong), 401)
    assert_refused(ask(place, "GET", "/api/v1/runs", "Authorization: Bearer x"), 401)
    assert_refused(ask(place, "GET", f"/api/v1/runs?token={right}", token=False), 401)
    assert_refused(ask(place, "GET", "/api/v1/runs", f"Cookie: token={right}", token=False), 401)
    assert_refused(ask(place, "GET", "/api/v1/runs", f"Authorization: Basic {right}", token=False), 401)
    assert_refused(ask(place, "GET", "/api/v1/runs", f"Authorization: bearer  {right}", token=False), 401)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1", "localhost", "127.0.0.1:{next}", "localhost:{next}", "127.0.0.1:{port}.evil.example",
     "evil.example:{port}", "0.0.0.0:{port}", "[::1]:{port}", "127.1:{port}", "2130706433:{port}", "127.0.0.1:0{port}",
     "LOCALHOST:{port}", "localhost.:{port}", "user@127.0.0.1:{port}", "127.0.0.1:{port}/", ""],
)  # fmt: skip
def test_another_host_is_not_served(place, host):
    name = host.format(port=place.port, next=place.port + 1)
    for path in ("/", "/app.js", "/api/v1/runs"):
        for method in ("GET", "POST", "HEAD"):
            assert_refused(ask(place, method, path, host=name or " "), 400, 403)


def test_no_host_two_hosts_or_an_absolute_target_is_refused(place):
    here = f"127.0.0.1:{place.port}"
    assert_refused(ask(place, host=False))
    assert_refused(ask(place, "GET", "/api/v1/runs", "Host: evil.example"))
    assert_refused(ask(place, "GET", "/api/v1/runs", f"Host: {here}"))
    assert_refused(ask(place, "GET", f"http://evil.example:{place.port}/api/v1/runs", "X-Forwarded-Host: evil.example"))
    assert_refused(ask(place, "GET", "/api/v1/runs", f"X-Forwarded-Host: {here}", host="evil.example"), 403)


@pytest.mark.parametrize(
    "header",
    ["Origin: http://evil.example", "Origin: null", "Origin: http://127.0.0.1", "Origin: http://localhost:{port}",
     "Origin: https://127.0.0.1:{port}", "Origin: http://127.0.0.1:{next}", "Origin: http://127.0.0.1:{port}.evil.example",
     "Origin: file://", "Origin: http://127.0.0.1:{port} http://evil.example", "Origin: ",
     "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"],
)  # fmt: skip
def test_a_request_of_another_page_is_refused_even_with_the_token(place, header):
    line = header.format(port=place.port, next=place.port + 1)
    for method, path in [("GET", "/"), ("GET", "/api/v1/runs"), ("POST", "/api/v1/runs"), ("OPTIONS", "/api/v1/runs"),
                         ("POST", "/api/v1/runs/run/stop")]:  # fmt: skip
        assert_refused(ask(place, method, path, line), 403)


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", "application/xml", "",
     "application/json-patch+json", "text/plain; application/json"],
)  # fmt: skip
def test_a_form_of_another_page_starts_nothing(place, kind):
    body = json.dumps({"save_dir": str(place.runs_dir / "forged"), "device": "cpu"}).encode()
    assert_refused(ask(place, "POST", "/api/v1/runs", f"Content-Type: {kind}", body=body), 415)
    assert_refused(ask(place, "POST", "/api/v1/runs", f"Content-Type: {kind}", body=body, token=False), 401)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../outside/secret-run", "..%2foutside%2fsecret-run", "%2e%2e", "%2e%2e%2foutside%2fsecret-run",
     "%00", "..%252foutside", "run%00", "run%2f..%2frun",
     "linked", "up", "up%2foutside%2fsecret-run", "%2fetc", "//etc/passwd",
     "..%5coutside", "%c0%ae%c0%ae", "run/../../outside/secret-run", ".token", "%2etoken", "a" * 300, "%ff%fe"],
)  # fmt: skip
def test_no_name_leads_out_of_the_directory(place, name):
    for tail in ("", "/progress", "/metrics", "/log", "/config", "/report", "/report/x.png"):
        assert_refused(ask(place, "GET", f"/api/v1/runs/{name}{tail}"), 404, 405)
    for command in ("pause", "resume", "save", "stop"):
        assert_refused(ask(place, "POST", f"/api/v1/runs/{name}/{command}"), 404, 405)


@pytest.mark.parametrize(
    "name",
    ["../log.txt", "..%2fstate.json", "passwords.txt", "passwords.txt%00.png", "..%2f..%2foutside%2fpasswords.txt",
     "%2e%2e%2fconfig.yaml", ".png", "x.png/..", "report.md"],
)  # fmt: skip
def test_no_image_leads_out_of_the_report(place, name):
    for run in ("run", "odd"):
        assert_refused(ask(place, "GET", f"/api/v1/runs/{run}/report/{name}"), 404, 405)


@pytest.mark.parametrize(
    "path",
    ["/../.token", "/%2e%2e/.token", "/..%2f.token", "/page/../server.py", "/app.js/../gate.py", "/style.css%00.js",
     "/server.py", "/security.py", "//app.js", "/.git/config", "/app.js/", "/APP.JS", "/static/app.js", "/%61pp.jsx"],
)  # fmt: skip
def test_no_other_file_is_public(place, path):
    assert_refused(ask(place, "GET", path, token=False), 401, 404)
    assert_refused(ask(place, "GET", path), 404)


def test_links_and_pipes_inside_a_run_are_not_followed(place):
    for tail in ("", "/progress", "/metrics", "/metrics?since=0", "/log", "/config", "/report"):
        answer = ask(place, "GET", f"/api/v1/runs/odd{tail}")
        assert SECRET not in answer and "secret-run" not in answer and status_of(answer) in (200, 404)
    assert SECRET not in ask(place, "GET", "/api/v1/runs") and "linked" not in ask(place, "GET", "/api/v1/runs")
    heard = place.messages("odd", lambda m: m["type"] == "snapshot")
    assert not heard[-1]["series"] and SECRET not in json.dumps(heard)


def test_a_large_body_is_refused_before_it_is_read(place):
    post = ("POST", "/api/v1/runs", JSON_TYPE)
    assert_refused(ask(place, *post, f"Content-Length: {10**9}"), 413)
    assert_refused(ask(place, *post, "Content-Length: -1"), 400, 413)
    assert_refused(ask(place, *post, "Content-Length: 5", "Content-Length: 6"), 400)
    assert_refused(ask(place, *post, "Transfer-Encoding: gzip, chunked", "Content-Length: 4"), 400, 501)
    assert_refused(ask(place, *post, body=b'{"a": "' + b"x" * security.MAX_BODY_BYTES + b'"}'), 413)
    assert_refused(ask(place, "GET", "/api/v1/runs", JSON_TYPE, body=b"{}"), 413)


def test_an_endless_body_is_cut_off(place):
    head = f"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1:{place.port}\r\nAuthorization: Bearer {place.token}\r\n"
    with socket.create_connection(("127.0.0.1", place.port), timeout=10) as line:
        line.sendall(f"{head}{JSON_TYPE}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        sent, ended = 0, False
        try:
            while sent < 50_000_000:
                line.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
        except (ConnectionError, TimeoutError):
            ended = True
    assert ended and sent < 20_000_000


def test_slow_headers_and_slow_bodies_are_cut_off(place, monkeypatch):
    monkeypatch.setattr(security, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(security, "BODY_SECONDS", 0.5)
    began = time.monotonic()
    assert talk(place, "GET /api/v1/runs HTTP/1.1\r\nX-Slow: ") == ""
    assert talk(place, "") == ""
    head = f"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1:{place.port}\r\nAuthorization: Bearer {place.token}\r\n"
    answer = talk(place, f"{head}{JSON_TYPE}\r\nContent-Length: 100\r\n\r\n{{")
    assert status_of(answer) == 408 and time.monotonic() - began < 8


def test_large_headers_and_nonsense_are_refused(place):
    assert_refused(ask(place, "GET", "/api/v1/runs", "X-Large: " + "x" * 40_000), 400, 431)
    assert_refused(ask(place, "GET", "/api/v1/runs?" + "q" * 40_000), 400, 431)
    assert_refused(talk(place, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), 400)
    assert_refused(talk(place, "GET / HTTP/9.9\r\n\r\n"), 400, 403, 505)
    assert_refused(talk(place, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 400, 403, 505)
    assert_refused(ask(place, "GET", "/api/v1/runs", "X-A: b\x00c"), 400)


def test_too_many_connections_are_turned_away_and_the_rest_is_served(place, monkeypatch):
    monkeypatch.setattr(security, "MAX_CONNECTIONS", 20)
    lines = [socket.create_connection(("127.0.0.1", place.port), timeout=5) for _ in range(40)]
    time.sleep(0.3)
    for line in lines:
        line.close()
    time.sleep(0.3)
    assert status_of(ask(place)) == 200


def handshake(place, path="/ws/runs/run", host=None, origin=None, protocols=()):
    return connect(
        f"ws://127.0.0.1:{place.port}{path}", subprotocols=list(protocols) or None, origin=origin, proxy=None,
        additional_headers={"Host": host} if host else None, open_timeout=5, close_timeout=0.2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:{port}",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        "file://",
    ],
)
def test_a_websocket_of_another_page_is_refused(place, origin):
    right = [f"bearer.{place.token}"]
    with pytest.raises(InvalidHandshake), handshake(place, origin=origin.format(port=place.port), protocols=right):
        pass


@pytest.mark.parametrize(
    "protocols",
    [[], ["dashboard.v1"], ["bearer."], ["bearer.x"], ["bearer." + "A" * 43], ["Bearer"], ["bearer.x", "bearer.y"]],
)
def test_a_websocket_without_the_token_is_refused(place, protocols):
    with pytest.raises(InvalidHandshake), handshake(place, protocols=protocols):
        pass
    with pytest.raises(InvalidHandshake), handshake(place, f"/ws/runs/run?token={place.token}", protocols=protocols):
        pass


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "nobody", "linked", "up", "..%2foutside%2fsecret-run", "", "a/b", "%00"]
)
def test_a_websocket_of_no_run_is_refused(place, name):
    with pytest.raises(InvalidHandshake), handshake(place, f"/ws/runs/{name}", protocols=[f"bearer.{place.token}"]):
        pass


def test_a_client_that_talks_is_left(place):
    right = [f"bearer.{place.token}"]
    for said in ("stop", "x" * 100_000, b"\x00" * 10):
        with handshake(place, protocols=right) as client:
            assert client.subprotocol == right[0]
            client.send(said)
            ended = False
            for _ in range(50):
                try:
                    client.recv(timeout=5)
                except TimeoutError:
                    break
                except Exception:
                    ended = True
                    break
            assert ended


def test_every_answer_has_the_headers_that_hold_a_browser_back(place):
    bad = ask(place, "POST", "/api/v1/runs", JSON_TYPE, body=b"[]")
    for answer in (ask(place), ask(place, token=False), ask(place, path="/", token=False), ask(place, path="/no"), bad):
        head = answer.split("\r\n\r\n")[0].lower()
        policy = next(line for line in head.splitlines() if line.startswith("content-security-policy:"))
        assert (
            "default-src 'none'" in policy and "script-src 'self';" in policy and "http" not in policy.split(":", 1)[1]
        )
        assert "unsafe-eval" not in policy and "*" not in policy and "frame-ancestors 'none'" in policy
        assert "x-content-type-options: nosniff" in head and "referrer-policy: no-referrer" in head
        assert "cache-control: no-" in head and "access-control" not in head and "server:" not in head
    assert "cache-control: no-store" in ask(place).lower()


def test_the_token_is_for_this_user_alone_and_made_once(tmp_path):
    token = security.make_token(tmp_path)
    path = tmp_path / ".token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and security.make_token(tmp_path) == token and len(token) == 43
    path.chmod(0o644)
    with pytest.raises(ValueError, match="may be read by others"):
        security.make_token(tmp_path)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(ValueError, match="holds no token"):
        security.make_token(tmp_path)
    path.unlink()
    (tmp_path / "elsewhere").write_text(token)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        security.make_token(tmp_path)


def test_the_page_builds_no_markup_from_text():
    from scripts.dashboard.server import PAGE

    texts = {path.name: path.read_text() for path in PAGE.glob("*.js")}
    assert len(texts) >= 8
    for name, text in texts.items():
        for risky in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert risky not in text, (name, risky)
    assert "http://" not in "".join(texts.values()).replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in "".join(texts.values())
