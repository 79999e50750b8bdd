"""The page in a real browser: live points, commands, a server that dies, bad numbers, two tabs, and the form.

Without Chromium these tests are skipped, but not where CI=true: a green run there must have seen the page.
"""

import json
import math
import os
import re
import shutil
import sys
import time

import pytest

from tests.dashboard_world import ServerProcess, make_run, record, served, write_records, write_state
from tests.small_world import TINY, write_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium here", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "CI=true and no chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with served(tmp_path_factory.mktemp("runs")) as place:
        yield place


class Tab:
    """A tab of the page that notes whatever went wrong in it and wherever it went."""

    def __init__(self, browser, place, view="", **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.wrong, self.requested = [], []
        self.page.on(
            "console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("websocket", lambda socket: self.requested.append(socket.url))
        self.place = place
        self.page.goto(place.page_url)
        if view:
            self.page.goto(f"{place.url}/{view}")

    def wait(self, expression, seconds=25):
        """Until a JavaScript expression is true; evaluated from outside, since the page allows no eval."""
        deadline = time.monotonic() + seconds
        while not (value := self.page.evaluate(expression)):
            assert time.monotonic() < deadline, (expression, self.wrong, self.page.inner_text("body")[:1500])
            time.sleep(0.05)
        return value

    def steps(self, name="train/loss"):
        return self.page.evaluate(f"window.__dashboard.series({json.dumps(name)})?.step ?? []")

    def wait_for_step(self, step, seconds=25):
        self.wait(f"(window.__dashboard.series('train/loss')?.step.at(-1) ?? 0) >= {step}", seconds)

    def status(self):
        return self.page.locator(".head [role=status]").inner_text()

    def wait_for_status(self, status, seconds=25):
        self.wait(f"document.querySelector('.head [role=status]')?.textContent === {json.dumps(status)}", seconds)

    def close(self, but=r"^$"):
        """Nothing but what `but` matches may have gone wrong, and nothing may have been asked of anybody else."""
        self.context.close()
        assert [text for text in self.wrong if not re.search(but, text)] == []
        allowed = (f"{self.place.url}/", f"ws://127.0.0.1:{self.place.port}/", f"blob:{self.place.url}/", "data:")
        assert [url for url in self.requested if not url.startswith(allowed)] == []
        assert not [url for url in self.requested if self.place.token in url.split("#")[0]]


def test_the_empty_page_offers_the_demo_and_hides_the_token(browser, tmp_path):
    with served(tmp_path / "runs") as place:
        tab = Tab(browser, place)
        tab.page.get_by_role("link", name="Start the demo run").wait_for()
        assert tab.page.url == f"{place.url}/"
        assert tab.page.evaluate("sessionStorage.getItem('dashboard-token')") == place.token
        tab.page.get_by_role("link", name="Start the demo run").click()
        tab.page.get_by_label("name").first.wait_for()
        assert tab.page.locator("#flag-save_dir").input_value() == "demo"
        assert tab.page.locator("#flag-hidden_size").input_value() == "96"
        tab.close()
        stranger = browser.new_context().new_page()
        stranger.goto(place.url)
        stranger.get_by_label("Token").fill(place.token)
        stranger.get_by_role("button", name="Open").click()
        stranger.get_by_text("No runs yet").wait_for()
        stranger.context.close()


def test_live_points_pause_resume_and_stop(browser, tmp_path):
    with served(tmp_path / "runs") as place:
        place.post("/runs", {"save_dir": str(place.runs_dir / "live"), "max_steps": 3000, "device": "cpu"})
        tab = Tab(browser, place, "#/run/live")
        tab.wait_for_step(10)
        first = tab.steps()[-1]
        tab.wait_for_step(first + 10)
        assert tab.page.locator("#link").inner_text() == "live"
        tab.page.get_by_role("button", name="Pause").click()
        tab.wait_for_status("paused")
        time.sleep(0.6)
        stood = tab.steps()[-1]
        time.sleep(0.8)
        assert tab.steps()[-1] == stood
        tab.page.get_by_role("button", name="Resume").click()
        tab.wait_for_status("running")
        tab.wait_for_step(stood + 5)
        tab.page.get_by_role("button", name="Save now").click()
        tab.wait("window.__dashboard.data.events.some((e) => e.event === 'checkpoint')")
        tab.page.get_by_role("button", name="Stop").click()
        tab.page.get_by_role("button", name="Keep training").click()
        assert tab.status() == "running"
        tab.page.get_by_role("button", name="Stop").click()
        tab.page.get_by_test_id("confirm-stop").click()
        tab.wait_for_status("stopped")
        ended = tab.steps()
        assert ended == list(range(1, len(ended) + 1)) and (place.runs_dir / "live" / "checkpoint.json").exists()
        tab.page.get_by_role("button", name="Resume").click()
        tab.wait_for_step(ended[-1] + 5)
        steps = tab.steps()
        assert steps == list(range(1, steps[-1] + 1))
        place.post("/runs/live/stop")
        tab.wait_for_status("stopped")
        tab.close()


def test_a_server_that_dies_leaves_no_gap(browser, tmp_path):
    runs = tmp_path / "runs"
    run = make_run(runs, "kept", steps=30)
    with ServerProcess(runs) as server:
        tab = Tab(browser, server.place, "#/run/kept")
        tab.wait_for_step(30)
        server.kill()
        tab.wait("document.getElementById('link').textContent === 'reconnecting'")
        write_records(run, [record(step) for step in range(31, 41)], "a")
        server.start()
        write_records(run, [record(step) for step in range(41, 51)], "a")
        tab.wait_for_step(50)
        assert tab.page.locator("#link").inner_text() == "live"
        assert tab.steps() == list(range(1, 51))
        tab.close(but="WebSocket connection|ERR_CONNECTION_REFUSED|Failed to load resource")


def test_a_resume_that_cuts_the_file_back_redraws(browser, place):
    run = make_run(place.runs_dir, "cut", steps=40)
    tab = Tab(browser, place, "#/run/cut")
    tab.wait_for_step(40)
    temporary = run / ".m"
    temporary.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 21)))
    os.replace(temporary, run / "metrics.jsonl")
    tab.wait("window.__dashboard.series('train/loss')?.step.length === 20")
    write_records(run, [record(step, time=5e9) for step in range(21, 26)], "a")
    tab.wait_for_step(25)
    assert tab.steps() == list(range(1, 26))
    tab.close()


def test_bad_numbers_and_hostile_text_are_shown_as_what_they_are(browser, place):
    evil = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    name = "<img src=x onerror=document.title=1>"
    run = make_run(place.runs_dir, name, steps=12)
    sample = {"kind": "event", "event": "sample", "time": 1.0, "step": 12, "exact": False}
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "time": 1.0, "kind": "train", "train/loss": NaN}\n')
        file.write(json.dumps({**sample, "prompt": evil, "expected": evil, "answer": "</dd>" + evil}) + "\n")
        file.write(json.dumps({"step": 3, "time": 1.0, "kind": "event", "event": "stage", "name": evil}) + "\n")
    alert = {"level": "error", "rule": evil, "step": 5, "time": 1.0, "numbers": {evil: evil}, "advice": evil}
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    (run / "log.txt").write_text(evil)
    (run / "data_report.json").write_text(json.dumps({evil: {evil: evil}}))
    (run / "report").mkdir()
    (run / "report" / "report.md").write_text(
        f"# {evil}\n\n{evil} ![{evil}](javascript:alert(1))\n\n| {evil} |\n|---|\n"
    )
    write_state(run, "failed", exit_reason=evil, step=13)
    tab = Tab(browser, place)
    tab.page.get_by_role("link", name=f"{name}, failed").click()
    tab.wait("window.__dashboard.drawn > 0")
    assert tab.page.get_by_test_id("card-loss").locator(".value").inner_text() == "not finite"
    assert tab.page.evaluate("window.__dashboard.series('train/loss').value.at(-1)") is None
    for title in ("Answers", "Data", "Config", "Log", "Report"):
        tab.page.get_by_role("tab", name=title).click()
        time.sleep(0.3)
    assert evil in tab.page.locator("#panel-samples").text_content()
    assert evil in tab.page.locator("#panel-log").text_content()
    assert evil in tab.page.locator("#panel-report").text_content()
    assert tab.page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert "hacked" not in tab.page.title()
    tab.close()


def test_the_report_of_the_trainer_reads_as_it_was_meant(browser, place):
    from training.diagnosis.report import write_report

    run = make_run(place.runs_dir, "a_b*c*-[d]", steps=30)
    odd = "1 < 2 && `x` *y* | z_z \\\\ [a](b) <i>&amp;</i> **no**"
    answer = "```` four\n```\n| a | b |\n\\* &lt;"
    sample = {"kind": "event", "event": "sample", "time": 1.0, "step": 30, "exact": False}
    write_records(run, [{**sample, "prompt": "# p", "expected": "", "answer": answer}], "a")
    alert = {
        "level": "error",
        "rule": "loss_spike",
        "step": 9,
        "time": 1.0,
        "numbers": {"z_score": 7.5},
        "kind": "train",
    }
    (run / "alerts.jsonl").write_text(json.dumps({**alert, "advice": odd}) + "\n")
    write_state(run, "failed", exit_reason=odd, step=30)
    (run / "final").mkdir()
    text = write_report(run, plots=False).read_text()
    assert r"1 \< 2 &amp;&amp; \`x\`" in text and "`````text" in text
    (run / "report" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    tab = Tab(browser, place, "#/run/" + "a_b*c*-%5Bd%5D")
    tab.page.get_by_role("tab", name="Report").click()
    tab.wait("document.querySelectorAll('#panel-report table').length > 1")
    report = tab.page.locator("#panel-report")
    assert report.locator("h2").first.text_content() == "a_b*c*-[d]: failed"
    rows = {row[0]: row[1:] for row in tab.page.evaluate(
        "[...document.querySelectorAll('#panel-report tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )}  # fmt: skip
    assert rows["ended by"] == [odd] and rows["status"] == ["failed"]
    assert rows["9"] == ["error", "loss_spike", "z_score 7.5"]
    item = report.locator("li").filter(has_text="loss_spike")
    assert (
        item.text_content() == f"loss_spike (step 9): {odd}" and item.locator("strong").text_content() == "loss_spike"
    )
    assert report.locator("pre").text_content() == f"prompt:\n# p\n\nexpected:\n\n\nanswer:\n{answer}"
    assert f"python -m scripts.chat {run}/final" in report.locator("code").all_text_contents()
    assert report.locator("i, a").count() == 0
    tab.close()


def test_markdown_takes_time_in_proportion_to_its_length(browser, place):
    tab = Tab(browser, place)
    for unit in ("`", "``x`", "**", "*", "![", "](", "\\\\", "|", "&", "[", "![](", "** ` ![a](b"):
        seconds = tab.page.evaluate(
            """async (unit) => {
                const { render } = await import("/markdown.js");
                const text = unit.repeat(Math.ceil(200000 / unit.length)), started = performance.now();
                render(text, (source, title) => title);
                return (performance.now() - started) / 1000;
            }""",
            unit,
        )
        assert seconds < 3, unit
    tab.close()


def test_alerts_are_errors_first_then_the_newest(browser, place):
    run = make_run(place.runs_dir, "alarmed", steps=30)
    alerts = [
        {"level": level, "rule": rule, "step": step, "time": 1.0, "numbers": {"tokens": 12345.0, "z": 7.25, "steps": 3}}
        for level, rule, step in (
            ("error", "old", 2),
            ("error", "new", 9),
            ("warning", "late", 20),
            ("info", "last", 30),
        )
    ]
    (run / "alerts.jsonl").write_text("".join(json.dumps(alert) + "\n" for alert in alerts))
    tab = Tab(browser, place, "#/run/alarmed")
    tab.wait("document.querySelectorAll('.alerts .alert').length === 4")
    assert tab.page.locator(".alerts strong").all_text_contents() == ["new", "old", "last", "late"]
    assert tab.page.locator(".alerts .numbers").first.text_content() == "tokens 12,345 · z 7.250 · steps 3"
    tab.close()


def test_the_buttons_are_those_that_the_run_accepts(browser, place):
    run = make_run(place.runs_dir, "buttons", steps=5, seconds=7322.0)
    tab = Tab(browser, place, "#/run/buttons")

    def wait_for_buttons(*names):
        shown = "[...document.querySelectorAll('.head .actions > [data-command]')].filter((b) => !b.hidden)"
        tab.wait(f"{shown}.map((b) => b.dataset.command).join(' ') === {json.dumps(' '.join(names))}")

    wait_for_buttons("pause", "save", "stop")
    assert tab.page.get_by_test_id("when").inner_text().startswith("2h 02m"), "over all starts"
    place.post("/runs/buttons/save")
    place.post("/runs/buttons/stop")
    wait_for_buttons("stop")
    tab.page.get_by_role("button", name="Stop").click()
    with tab.page.expect_response(lambda answer: answer.url.endswith("/runs/buttons/stop")) as stopped:
        tab.page.get_by_test_id("confirm-stop").click()
    assert stopped.value.status == 202
    write_state(run, "stalled", host="elsewhere", seconds=1.0)
    wait_for_buttons("resume")
    write_state(run, "completed")
    wait_for_buttons()
    assert not [e for e in tab.page.evaluate("window.__dashboard.data.events") if e["event"] == "pause"]
    tab.close()


def test_a_run_that_does_not_train_yet_is_stopped_on_the_page(browser, tmp_path):
    def slow(processes, words):
        return [sys.executable, "-c", "import time; time.sleep(100)"]

    with served(tmp_path / "runs", slow) as place:
        assert place.post("/runs", {"save_dir": str(place.runs_dir / "new"), "device": "cpu"}).status_code == 201
        tab = Tab(browser, place, "#/run/new")
        tab.wait_for_status("pending")
        tab.page.get_by_role("button", name="Stop").click()
        tab.page.get_by_text("It has not begun to train").wait_for()
        tab.page.get_by_test_id("confirm-stop").click()
        tab.wait_for_status("stopped")
        assert not tab.page.locator(".head .actions > button:visible").count()
        tab.close()


def test_two_tabs_agree(browser, place):
    run = make_run(place.runs_dir, "twice", steps=15)
    tabs = [Tab(browser, place, "#/run/twice") for _ in range(2)]
    for tab in tabs:
        tab.wait_for_step(15)
    write_records(run, [record(step) for step in range(16, 31)], "a")
    write_state(run, "paused", step=30)
    for tab in tabs:
        tab.wait_for_step(30)
        tab.wait_for_status("paused")
    assert tabs[0].steps() == tabs[1].steps() == list(range(1, 31))
    for tab in tabs:
        tab.close()


def test_a_crash_shows_as_crashed(browser, tmp_path):
    with served(tmp_path / "runs") as place:
        place.post("/runs", {"save_dir": str(place.runs_dir / "dies"), "seed": 666, "device": "cpu"})
        tab = Tab(browser, place, "#/run/dies")
        tab.wait_for_status("crashed")
        assert tab.page.get_by_role("button", name="Resume").is_visible()
        assert not tab.page.get_by_role("button", name="Pause").is_visible()
        tab.close()


def test_a_run_is_started_from_the_form_and_a_bad_form_says_where(browser, tmp_path):
    with served(tmp_path / "runs") as place:
        tab = Tab(browser, place, "#/new")
        page = tab.page
        page.locator("#flag-save_dir").fill("mine")
        page.locator("#flag-learning_rate").fill("fast")
        page.get_by_label("Find a flag").fill("label_smoothing")
        page.locator("#flag-label_smoothing").fill("7")
        page.get_by_role("button", name="Start training").click()
        page.locator("#flag-learning_rate-error").get_by_text("not a number").wait_for()
        page.locator("#flag-learning_rate").fill("0.01")
        page.get_by_role("button", name="Start training").click()
        page.locator("#flag-label_smoothing-error").get_by_text("at most 0.5").wait_for()
        assert page.locator("#flag-label_smoothing").get_attribute("aria-invalid") == "true"
        assert page.evaluate("document.activeElement.id") == "flag-label_smoothing"
        assert not (place.runs_dir / "mine").exists()
        page.locator("#flag-label_smoothing").fill("0.1")
        page.locator("#flag-device").select_option("cpu")
        page.locator("#flag-max_steps").fill("2000")
        page.get_by_role("button", name="Start training").click()
        tab.wait("location.hash === '#/run/mine'")
        tab.wait_for_step(5)
        assert "--label_smoothing=0.1" in place.get("/runs/mine/log")["text"]
        place.post("/runs/mine/stop")
        tab.wait_for_status("stopped")
        tab.close(but="422")


def test_controls_compare_marks_and_alerts(browser, place):
    run = make_run(place.runs_dir, "rich", steps=60)
    make_run(place.runs_dir, "other", steps=50)
    events = [{"step": s, "time": 1.7e9, "kind": "event", "event": "checkpoint"} for s in (20, 40)]
    events.append({"step": 30, "time": 1.7e9, "kind": "event", "event": "stage", "name": "second"})
    events.append({"step": 40, "time": 1.7e9, "kind": "eval", "eval/loss": 2.5})
    events += [{"step": 50, "time": 1.7e9, "kind": "event", "event": name} for name in ("pause", "resume", "save")]
    write_records(run, events, "a")
    alert = {
        "level": "warning",
        "rule": "loss_spike",
        "step": 9,
        "time": 1.0,
        "numbers": {"z": 7.5},
        "advice": "look there",
    }
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    tab = Tab(browser, place, "#/run/rich", viewport={"width": 1280, "height": 1400})
    tab.wait("window.__dashboard.drawn > 0")
    page, loss = tab.page, "document.querySelector('[data-testid=chart-loss] .plot')"
    page.locator(".alerts").get_by_text("look there").wait_for()
    assert len(page.evaluate(f"{loss}.layout.shapes")) == 5
    assert "2.5 at step 40" in page.get_by_test_id("card-eval").inner_text().replace("2.500", "2.5")
    raw, smoothed = page.evaluate(f"{loss}.data.slice(0, 2).map((t) => t.y)")
    mean, weight = 0.0, 0.6
    for place_, value in enumerate(raw, start=1):
        mean = weight * mean + (1 - weight) * value
        assert math.isclose(smoothed[place_ - 1], mean / (1 - weight**place_), rel_tol=1e-9)
    page.locator("#smoothing").fill("0")
    tab.wait(f"{loss}.data.length === 2")
    page.locator("#log").check()
    tab.wait(f"{loss}.layout.yaxis.type === 'log'")
    page.locator("#by").select_option("tokens")
    tab.wait(f"Math.abs({loss}.data[0].x[9] - 0.01) < 1e-9")
    page.locator("#by").select_option("time")
    tab.wait(f"Math.abs({loss}.data[0].x[59] - 59 / 60) < 1e-6")
    page.locator("#by").select_option("step")
    page.locator("#compare").select_option("other")
    tab.wait(f"{loss}.data.some((trace) => trace.name.includes('other') && trace.x.length === 50)")
    box = page.locator("[data-testid=chart-loss] .plot").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 100, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Show all").wait_for()
    norm = "document.querySelector('[data-testid=chart-grad-norm] .plot')"
    tab.wait(f"{norm}.layout.xaxis.range?.[0] > 5 && {norm}.layout.xaxis.range[0] === {loss}.layout.xaxis.range[0]")
    for x in range(300, 500):  # a chart that is just being drawn shows no cursor
        page.mouse.move(box["x"] + x, box["y"] + 150)
        time.sleep(0.1)
        if shown := page.evaluate(f"{norm}.querySelectorAll('.hoverlayer > *').length"):
            break
    assert shown
    page.get_by_role("tab", name="Config").click()
    assert "torchrun --standalone" in page.get_by_test_id("command").inner_text()
    tab.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_is_read_by_keyboard(browser, place, width, scheme):
    make_run(place.runs_dir, "fits-a-name-that-is-rather-long-for-a-small-window", steps=30)
    tab = Tab(browser, place, viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.page.get_by_test_id("run").first.wait_for()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    tab.page.goto(f"{place.url}/#/run/fits-a-name-that-is-rather-long-for-a-small-window")
    tab.wait("window.__dashboard.drawn > 0")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    tab.page.locator("#tab-samples").focus()
    tab.page.keyboard.press("ArrowRight")
    assert tab.page.locator("#tab-data").get_attribute("aria-selected") == "true"
    tab.page.goto(f"{place.url}/#/new")
    tab.page.locator("#flag-save_dir").wait_for()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()


def test_one_real_run_of_two_processes(browser, tmp_path):
    from scripts.dashboard.jobs import torchrun

    rows = write_rows(tmp_path / "rows.jsonl")
    with served(tmp_path / "runs", torchrun) as place:
        flags = {**TINY, "epochs": 5000, "data_path": str(rows), "cache_dir": str(tmp_path / "cache"), "keep_last": 2}
        flags |= {"save_dir": str(place.runs_dir / "real"), "processes": 2, "save_interval": "100000"}
        assert place.post("/runs", flags).status_code == 201
        tab = Tab(browser, place, "#/run/real")
        tab.wait_for_step(5, seconds=100)
        tab.page.get_by_role("button", name="Pause").click()
        tab.wait_for_status("paused")
        time.sleep(0.6)
        stood = tab.steps()[-1]
        time.sleep(1)
        assert tab.steps()[-1] == stood
        tab.page.get_by_role("button", name="Resume").click()
        tab.wait_for_step(stood + 3)
        tab.page.get_by_role("button", name="Stop").click()
        tab.page.get_by_test_id("confirm-stop").click()
        tab.wait_for_status("stopped")
        assert list((place.runs_dir / "real" / "checkpoints").glob("step-*"))
        tab.close()
