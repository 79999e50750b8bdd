"""The dashboard's server: what it tells of a run, positions that survive, commands, and runs that it starts."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.dashboard_world import (
    ServerProcess,
    all_steps,
    make_run,
    record,
    served,
    write_records,
    write_state,
)
from tests.small_world import TINY, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with served(tmp_path_factory.mktemp("runs")) as place:
        yield place


def test_the_list_shows_status_progress_and_last_loss(place):
    make_run(place.runs_dir, "listed", steps=25)
    make_run(place.runs_dir, "crashed-one", pid=2**22 - 1)
    (place.runs_dir / "no-run").mkdir()
    (place.runs_dir / "link").symlink_to(place.runs_dir / "listed")
    found = {run["id"]: run for run in place.get("/runs")["runs"]}
    assert "no-run" not in found and "link" not in found
    run = found["listed"]
    assert (run["status"], run["step"], run["total_steps"], run["share"]) == ("running", 25, 100, 0.25)
    assert run["train_loss"] == record(25)["train/loss"] and len(run["sparkline"]) == 25
    assert run["eta_seconds"] == 60.0 and run["elapsed_seconds"] == pytest.approx(60, abs=1)
    assert found["crashed-one"]["status"] == "crashed"


def test_a_run_in_full(place):
    run = make_run(place.runs_dir, "full")
    (run / "data_report.json").write_text('{"train": {"rows_read": 3}}')
    (run / "environment.json").write_text('{"world_size": 2}')
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "report").mkdir()
    (run / "report" / "report.md").write_text("# Report\n\n![loss](loss.png)\n")
    (run / "report" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    (run / "report" / "fake.png").write_bytes(b"<svg>")
    (run / "log.txt").write_text("one\ntwo\n")
    found = place.get("/runs/full")
    assert found["data_report"] == {"train": {"rows_read": 3}}
    assert [each["step"] for each in found["checkpoints"]] == [10]
    assert found["last"]["train"]["step"] == 20 and found["has_report"]
    assert place.get("/runs/full/report")["images"] == ["fake.png", "loss.png"]
    assert place.http.get("/api/v1/runs/full/report/loss.png").content == b"\x89PNG\r\n\x1a\n123"
    assert place.http.get("/api/v1/runs/full/report/fake.png").status_code == 404
    assert place.get("/runs/full/log") == {"text": "one\ntwo\n", "position": 8, "reset": False, "skipped": False}
    assert place.get("/runs/full/log", since=4)["text"] == "two\n"
    assert place.get("/runs/full/log", since=99) == {
        "text": "one\ntwo\n",
        "position": 8,
        "reset": True,
        "skipped": False,
    }
    config = place.get("/runs/full/config")
    assert config["values"]["epochs"] == 3 and config["yaml"].startswith("data_path: demo")
    assert config["command"] == (
        "torchrun --standalone --nproc_per_node=2 train_full_sft.py --data_path=demo --epochs=3 --learning_rate=0.001 "
        "--device=cpu --save_dir=runs/full_sft"
    )
    system = place.get("/system")
    assert system["memory_total_bytes"] > 0 and isinstance(system["gpus"], list)


def test_metrics_since_a_position_come_once(place):
    run = make_run(place.runs_dir, "since", steps=10)
    first = place.get("/runs/since/metrics", since=0)
    assert [r["step"] for r in first["records"]] == list(range(1, 11)) and not first["more"]
    assert place.get("/runs/since/metrics", since=first["position"])["records"] == []
    write_records(run, [record(11)], "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "ki')  # a line that is being written
    second = place.get("/runs/since/metrics", since=first["position"])
    assert [r["step"] for r in second["records"]] == [11]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('nd": "train"}\n')
    assert [r["step"] for r in place.get("/runs/since/metrics", since=second["position"])["records"]] == [12]


def test_numbers_that_json_has_not_become_null(place):
    run = make_run(place.runs_dir, "nan", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "kind": "train", "train/loss": NaN, "time": Infinity, "deep": ' + "[" * 200 + "]" * 200)
        file.write('}\n{"step": 5, "kind": "train", "train/loss": 1e999, "x": -Infinity}\n[' + "[" * 100_000 + "\n")
        file.write(json.dumps(record(6, **{"train/loss": None, "non_finite": ["train/loss"]})) + "\n")
    write_state(run, "running", step=float("nan"))
    assert place.get("/runs/nan")["step"] is None
    assert [r["train/loss"] for r in place.get("/runs/nan/metrics", since=0)["records"]][3:] == [None, None, None]
    values = place.get("/runs/nan/metrics")["series"]["train/loss"]
    assert values["value"][-1] is None and values["step"][-1] == 6
    place.messages("nan", lambda m: m["type"] == "snapshot")
    place.messages("nan", lambda m: m["type"] == "metrics", since="0")


def test_a_client_hears_everything_once(place):
    run = make_run(place.runs_dir, "live", steps=5)
    with place.connect("live") as client:
        heard = [json.loads(client.recv(timeout=5))]
        for batch in range(4):
            write_records(run, [record(s) for s in range(6 + 10 * batch, 16 + 10 * batch)], "a")
            time.sleep(0.3)
        while all_steps(heard)[-1:] != [45]:
            heard.append(json.loads(client.recv(timeout=5)))
    assert all_steps(heard) == list(range(1, 46))
    assert {"state", "snapshot", "metrics"} <= {each["type"] for each in heard}
    middle = next(each for each in heard if each["type"] == "metrics")
    again = place.messages("live", lambda m: all_steps([m])[-1:] == [45], since=middle["position"])
    assert all_steps([*heard[: heard.index(middle) + 1], *again]) == list(range(1, 46))
    assert not [each for each in again if each["type"] in ("reset", "snapshot")]


def test_an_epoch_is_a_message_of_its_own(place):
    run = make_run(place.runs_dir, "epochs", steps=2)
    epoch = {"step": 2, "time": 5.0, "kind": "epoch", "epoch": 1, "train_loss": 2.0}
    write_records(run, [epoch, record(3)], "a")
    heard = place.messages("epochs", lambda m: all_steps([m])[-1:] == [3], since="0")
    told = next(each for each in heard if each["type"] == "epoch_progress")
    position = told.pop("position")
    assert told == {
        "type": "epoch_progress", "task_id": "epochs", "epoch": 1, "timestamp": 5.0,
        "metrics": {"step": 2, "epoch": 1, "train_loss": 2.0},
    }  # fmt: skip
    rest = place.messages("epochs", lambda m: m["type"] == "metrics", since=position)
    assert all_steps(rest) == [3] and not any(each["type"] == "epoch_progress" for each in rest)


def test_alerts_are_told_and_have_a_position(place):
    run = make_run(place.runs_dir, "alerts", steps=2)
    alert = {"level": "WARN", "rule": "spike", "step": 2, "time": 1.0, "numbers": {"loss": 3.5}, "advice": "look"}
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    with place.connect("alerts") as client:
        snapshot = next(m for m in iter(lambda: json.loads(client.recv(timeout=5)), None) if m["type"] == "snapshot")
        assert snapshot["alerts"] == [alert]
        with open(run / "alerts.jsonl", "a") as file:
            file.write(json.dumps({**alert, "step": 3}) + "\n" + json.dumps({**alert, "step": 4}) + "\n")
        first = next(m for m in iter(lambda: json.loads(client.recv(timeout=5)), None) if m["type"] == "alert")
    assert first["alert"]["step"] == 3
    again = place.messages("alerts", lambda m: m["type"] == "alert", since=first["position"])
    assert again[-1]["alert"]["step"] == 4


def rewrite(run, steps, shift=0.0):
    """What a resume does: the records up to a step in a new file under the old name."""
    temporary = run / ".metrics.tmp"
    temporary.write_text("".join(json.dumps(record(s, time=1.7e9 + s + shift)) + "\n" for s in steps))
    os.replace(temporary, run / "metrics.jsonl")


def test_a_file_that_was_cut_back_resets_its_clients(place):
    run = make_run(place.runs_dir, "cut", steps=20)
    with place.connect("cut") as client:
        heard = [json.loads(client.recv(timeout=5)) for _ in range(2)]
        position = next(m["position"] for m in heard if m["type"] == "snapshot")
        rewrite(run, range(1, 11))
        write_records(run, [record(s, time=5e9 + s) for s in range(11, 31)], "a")  # longer than it was
        while all_steps(heard)[-1:] != [30]:
            heard.append(json.loads(client.recv(timeout=5)))
    assert [m["type"] for m in heard].count("reset") == 1 and all_steps(heard) == list(range(1, 31))
    late = place.messages("cut", lambda m: m["type"] == "snapshot", since=position)
    assert [m["type"] for m in late if m["type"] != "state"] == ["reset", "snapshot"]
    assert place.get("/runs/cut/metrics", since=position)["reset"]


def test_a_file_with_the_same_beginning_goes_on(place):
    run = make_run(place.runs_dir, "same", steps=10)
    position = place.get("/runs/same/metrics", since=0)["position"]
    rewrite(run, range(1, 11))
    write_records(run, [record(11)], "a")
    found = place.get("/runs/same/metrics", since=position)
    assert not found["reset"] and [r["step"] for r in found["records"]] == [11]


@pytest.mark.parametrize("position", ["x", "-1", "12-.0-", "5-0123456789abcdef.0-", "9" * 40, "٣-.0-"])
def test_a_position_that_nobody_gave_out_starts_again(place, position):
    make_run(place.runs_dir, "odd", steps=4)
    heard = place.messages("odd", lambda m: m["type"] == "snapshot", since=position)
    assert heard[-2]["type"] == "reset" or heard[-3]["type"] == "reset"
    assert place.get("/runs/odd/metrics", since=position)["reset"]


def test_an_overwritten_run_starts_again(place):
    run = make_run(place.runs_dir, "over", steps=10)
    with place.connect("over") as client:
        heard = [json.loads(client.recv(timeout=5)) for _ in range(2)]
        (run / "metrics.jsonl").unlink()
        time.sleep(0.5)
        write_records(run, [record(s, time=9e9) for s in range(1, 4)])
        while all_steps(heard) != [1, 2, 3]:
            heard.append(json.loads(client.recv(timeout=5)))


def test_a_killed_server_loses_and_doubles_nothing(tmp_path):
    runs = tmp_path / "runs"
    run = make_run(runs, "killed", steps=30)
    with ServerProcess(runs) as server:
        heard = server.place.messages("killed", lambda m: all_steps([m])[-1:] == [30], since="0")
        server.kill()
        write_records(run, [record(s) for s in range(31, 41)], "a")
        server.start()
        write_records(run, [record(s) for s in range(41, 51)], "a")
        heard += server.place.messages("killed", lambda m: all_steps([m])[-1:] == [50], since=heard[-1]["position"])
    assert all_steps(heard) == list(range(1, 51))
    assert not [m for m in heard if m["type"] in ("reset", "snapshot")]


def test_a_long_run_is_thinned_without_losing_a_spike(place):
    records = [record(s) for s in range(1, 20_001)]
    records[12_345]["train/loss"] = 77.0
    records[4_321]["train/loss"] = None
    write_records(make_run(place.runs_dir, "long"), records)
    series = place.get("/runs/long/metrics")["series"]
    loss = series["train/loss"]
    assert all(len(each["step"]) <= 1500 for each in series.values())
    assert loss["value"][loss["step"].index(12_346)] == 77.0 and loss["value"][loss["step"].index(4_322)] is None
    assert loss["step"][0] == 1 and loss["step"][-1] == 20_000 and loss["step"] == sorted(loss["step"])


def test_commands_reach_the_run_and_the_wrong_ones_do_not(place):
    run = make_run(place.runs_dir, "commanded")
    assert place.get("/runs/commanded/progress")["accepts"] == ["pause", "save", "stop"]
    for command in ("save", "pause", "stop"):  # each takes the place of the one before
        answer = place.post(f"/runs/commanded/{command}")
        assert answer.status_code == 202
        content = json.loads((run / "control.json").read_text())
        assert content == {"id": answer.json()["request"], "command": command}
    lost = place.post("/runs/commanded/pause")
    assert lost.status_code == 409 and lost.json()["error"].startswith("commanded has not obeyed stop yet")
    assert place.get("/runs/commanded/progress")["accepts"] == ["stop"]
    (run / "control.json").unlink()
    assert place.post("/runs/commanded/resume").status_code == 409
    write_state(run, "paused")
    assert place.post("/runs/commanded/pause").status_code == 409
    assert place.post("/runs/commanded/resume").status_code == 202
    (run / "control.json").unlink()
    for status in ("completed", "stopped", "failed", "pending", "stopping"):
        write_state(run, status)
        for command in ("pause", "save", "stop"):
            answer = place.post(f"/runs/commanded/{command}")
            assert answer.status_code == 409 and status in answer.json()["error"], (status, command)
    write_state(run, "completed")
    assert place.post("/runs/commanded/resume").status_code == 409
    assert not (run / "control.json").exists()
    assert place.post("/runs/nobody/pause").status_code == 404
    assert place.post("/runs/commanded/explode").status_code == 404


def test_a_damaged_state_is_answered_with_nothing_in_its_place(place):
    run = make_run(place.runs_dir, "damaged")
    write_state(run, "running", step="12", total_steps="x", seconds=[], started_at="yesterday")
    found = place.get("/runs/damaged/progress")
    assert found["status"] == "running"
    assert (found["step"], found["total_steps"], found["share"], found["elapsed_seconds"]) == (None,) * 4
    assert "damaged" in [each["id"] for each in place.get("/runs")["runs"]]


def test_the_time_of_a_run_is_that_of_all_its_starts(place):
    run = make_run(place.runs_dir, "twice-started", seconds=7205.5)
    assert place.get("/runs/twice-started/progress")["elapsed_seconds"] == 7205.5
    write_state(run, "running")
    assert place.get("/runs/twice-started/progress")["elapsed_seconds"] == pytest.approx(60, abs=1)


def test_the_last_evaluation_is_found_behind_much_else(place):
    run = make_run(place.runs_dir, "seldom", steps=3)

    def held_out():
        listed = {each["id"]: each for each in place.get("/runs")["runs"]}["seldom"]["eval_loss"]
        assert place.get("/runs/seldom/progress")["eval_loss"] == listed
        return listed

    def evaluation(loss):
        return {"step": 3, "time": time.time(), "kind": "eval", "eval/loss": loss}

    assert held_out() is None
    write_records(run, [evaluation(2.5), *(record(step) for step in range(4, 12_004))], "a")  # 3 MB
    assert held_out() == 2.5 and held_out() == 2.5
    write_records(run, [evaluation(2.25), *(record(step) for step in range(4, 1000))], "a")
    assert held_out() == 2.25
    write_records(run, [record(step) for step in range(4, 1000)], "a")
    assert held_out() == 2.25
    write_records(run, [record(step, time=5e9) for step in range(1, 9000)])  # another run in its place
    assert held_out() is None


def test_the_last_record_of_a_kind_is_found_across_the_chunks_of_a_file(tmp_path, monkeypatch):
    from scripts.dashboard import runs

    monkeypatch.setattr(runs, "MAX_JSON_BYTES", 300)
    for shift in range(0, 300, 7):
        path = tmp_path / "metrics"
        lines = [{"step": 1, "kind": "eval", "x": "first"}, {"step": 2, "kind": "eval", "x": "y" * 80}]
        lines += [{"step": 3, "kind": "train", "note": 'no "eval"' + "z" * shift}]
        lines += [{"step": 4, "kind": "train", "note": "z" * 90}] * 9
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with open(path, "rb") as file:
            assert runs.last_of_kind(file, "eval", 0, path.stat().st_size)["step"] == 2
            assert runs.last_of_kind(file, "epoch", 0, path.stat().st_size) == {}


def test_a_run_of_another_host_is_not_in_the_way_and_a_silent_one_is_taken_over(tmp_path):
    with served(tmp_path / "runs") as place:
        body = {"save_dir": str(place.runs_dir / "new"), "max_steps": 2, "device": "cpu"}
        far = make_run(place.runs_dir, "far", host="elsewhere", max_steps=25)
        (far / "config.yaml").write_text("data_path: demo\ndevice: cpu\nmax_steps: 25\n")
        (far / "checkpoint.json").write_text('{"step": 20}')
        assert place.post("/runs/far/resume").status_code == 409, "it may be training there"
        over = place.post("/runs", {**body, "save_dir": str(far), "overwrite": True})
        assert over.status_code == 409
        assert place.post("/runs", body).status_code == 201
        place.wait_for(lambda: place.status("new") == "completed")
        write_state(far, "running", host="elsewhere", updated_at=time.time() - 600)
        assert place.status("far") == "stalled" and place.get("/runs/far")["accepts"] == ["resume"]
        place.wait_for(lambda: place.post("/runs/far/resume").status_code == 202)
        place.wait_for(lambda: place.status("far") == "completed")


def test_a_run_that_a_process_holds_is_in_the_way_wherever_it_says_that_it_is(tmp_path):
    with served(tmp_path / "runs") as place:
        far = make_run(place.runs_dir, "far", host="elsewhere", updated_at=time.time() - 600)
        program = (
            "import sys, pathlib; from training.control.lock import lock_run; "
            "held = lock_run(pathlib.Path(sys.argv[1])); print(1); input()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(far)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout.readline() == "1\n"
            assert place.status("far") == "stalled" and place.get("/runs/far")["accepts"] == []
            assert place.post("/runs/far/resume").status_code == 409
            body = {"save_dir": str(place.runs_dir / "new"), "max_steps": 2, "device": "cpu"}
            assert place.post("/runs", body).status_code == 409
            holder.communicate("\n")
        assert place.get("/runs/far")["accepts"] == ["resume"]


def test_a_run_that_does_not_train_yet_is_stopped(tmp_path):
    def slow(processes, words):
        return [sys.executable, "-c", "import time; time.sleep(100)"]

    with served(tmp_path / "runs", slow) as place:
        make_run(place.runs_dir, "of-a-terminal", status="pending")
        assert place.post("/runs/of-a-terminal/stop").status_code == 409
        write_state(place.runs_dir / "of-a-terminal", "stopped")
        assert place.post("/runs", {"save_dir": str(place.runs_dir / "new"), "device": "cpu"}).status_code == 201
        found = place.get("/runs/new")
        assert (found["status"], found["accepts"], found["state"]["accepts"]) == ("pending", ["stop"], ["stop"])
        assert place.post("/runs/new/pause").status_code == 409
        assert place.post("/runs/new/stop").status_code == 202
        place.wait_for(lambda: place.status("new") == "stopped", 10)
        assert place.get("/runs/new")["exit_reason"] == "a stop command before it began to train"
        assert place.post("/runs/new/stop").status_code == 409


def test_a_resume_has_the_threads_of_the_run_and_a_teacher_its_program(tmp_path):
    with served(tmp_path / "runs") as place:
        body = {"save_dir": str(place.runs_dir / "new"), "max_steps": 3000, "device": "cpu", "teacher": "runs/x/final"}
        assert place.post("/runs", body).status_code == 201
        place.wait_for(lambda: (place.get("/runs/new/progress")["step"] or 0) > 2)
        assert " -m scripts.train_distillation --" in place.get("/runs/new/log")["text"]
        command = place.get("/runs/new/config")["command"]
        assert "--nproc_per_node=1 -m scripts.train_distillation --" in command
        place.post("/runs/new/stop")
        place.wait_for(lambda: place.status("new") == "stopped")
        (place.runs_dir / "new" / "environment.json").write_text('{"world_size": 1, "threads_per_process": 13}')
        place.wait_for(lambda: place.post("/runs/new/resume").status_code == 202)
        place.wait_for(lambda: place.status("new") == "running")
        line = place.get("/runs/new/log")["text"].splitlines()[-1]
        assert " 13 threads: -m scripts.train_distillation --config=" in line
        place.post("/runs/new/stop")
        place.wait_for(lambda: place.status("new") == "stopped")


def test_wrong_flags_are_told_by_their_names(tmp_path):
    with served(tmp_path / "runs") as place:
        body = {
            "learning_rate": -1, "lerning_rate": 2, "epochs": "two", "processes": 0, "strategy": "magic",
            "save_dir": str(place.runs_dir / "new"),
        }  # fmt: skip
        answer = place.post("/runs", body)
        assert answer.status_code == 422
        errors = answer.json()["errors"]
        assert errors["learning_rate"] == ["--learning_rate -1.0: must be greater than 0"] or errors["epochs"]
        assert errors["lerning_rate"] == ["unknown flag --lerning_rate (did you mean --learning_rate?)"]
        assert errors["epochs"] == ["--epochs two: not a whole number"] and "processes" in errors
        crossed = {"warmup_steps": 3, "warmup_ratio": 0.1, "save_dir": str(place.runs_dir / "new")}
        assert list(place.post("/runs", crossed).json()["errors"]) == ["warmup_steps"]
        make_run(place.runs_dir, "taken", status="stopped")
        for name in (
            "../outside", "a/b", "/tmp/elsewhere", ".hidden", "", "taken", "-x", "a\0b", "é", "x" * 65, "<img>", "..",
        ):  # fmt: skip
            answer = place.post("/runs", {"save_dir": f"{place.runs_dir}/{name}"})
            assert answer.status_code == 422 and "save_dir" in answer.json()["errors"], name
        nul = place.post("/runs", {"save_dir": str(place.runs_dir / "nul"), "data_path": "a\0b"})
        assert list(nul.json()["errors"]) == ["data_path"]
        for odd in ([], "x", 3, None, [{}]):
            assert place.http.post("/api/v1/runs", content=json.dumps(odd), headers=JSON).status_code == 400
        assert place.http.post("/api/v1/runs", content="{", headers=JSON).status_code == 400
        assert {path.name for path in place.runs_dir.iterdir()} == {".token", "taken"}


JSON = {"content-type": "application/json"}


def test_a_run_is_started_stopped_and_resumed_with_the_stub(tmp_path):
    with served(tmp_path / "runs") as place:
        body = {"save_dir": str(place.runs_dir / "new"), "max_steps": 2000, "device": "cpu", "processes": 2}
        answer = place.post("/runs", body)
        assert answer.status_code == 201 and answer.json() == {"id": "new"}
        assert place.status("new") in ("pending", "running")
        other = place.post("/runs", {**body, "save_dir": str(place.runs_dir / "other")})
        assert other.status_code == 409 and "new" in other.json()["error"]
        assert not (place.runs_dir / "other").exists()
        place.wait_for(lambda: (place.get("/runs/new/progress")["step"] or 0) > 5)
        assert "--max_steps=2000" in place.get("/runs/new/log")["text"]
        assert place.post("/runs/new/stop").status_code == 202
        place.wait_for(lambda: place.status("new") == "stopped")
        launch = json.loads((place.runs_dir / "new" / "launch.json").read_text())
        place.wait_for(lambda: not os.path.exists(f"/proc/{launch['pid']}"))
        step = place.get("/runs/new/progress")["step"]
        assert place.post("/runs/new/resume").status_code == 202
        assert place.post("/runs/new/resume").status_code == 409
        place.wait_for(lambda: (place.get("/runs/new/progress")["step"] or 0) > step)
        records = place.get("/runs/new/metrics", since=0)["records"]
        steps = [r["step"] for r in records if r["kind"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
        log = place.get("/runs/new/log")["text"]
        assert "--from_resume=1" in log and "--config=" in log
        place.post("/runs/new/stop")
        place.wait_for(lambda: place.status("new") == "stopped")


def test_a_start_that_fails_says_so(tmp_path):
    def broken(processes, flags):
        return [sys.executable, "-c", "print('no such thing'); raise SystemExit(2)"]

    with served(tmp_path / "runs", broken) as place:
        assert place.post("/runs", {"save_dir": str(place.runs_dir / "bad"), "device": "cpu"}).status_code == 201
        place.wait_for(lambda: place.status("bad") == "failed")
        assert "no such thing" in place.get("/runs/bad/log")["text"]
        assert "log" in place.get("/runs/bad/progress")["exit_reason"]
        assert place.post("/runs/bad/resume").status_code == 409


def test_a_started_run_outlives_its_server(tmp_path):
    with ServerProcess(tmp_path / "runs") as server:
        place = server.place
        body = {"save_dir": str(place.runs_dir / "lives"), "max_steps": 3000, "device": "cpu"}
        assert place.post("/runs", body).status_code == 201
        place.wait_for(lambda: (place.get("/runs/lives/progress")["step"] or 0) > 3)
        server.kill()
        before = len((place.runs_dir / "lives" / "metrics.jsonl").read_bytes())
        time.sleep(0.5)
        assert len((place.runs_dir / "lives" / "metrics.jsonl").read_bytes()) > before
        server.start()
        assert place.status("lives") == "running"
        assert place.post("/runs", {**body, "save_dir": str(place.runs_dir / "next")}).status_code == 409
        place.post("/runs/lives/stop")
        place.wait_for(lambda: place.status("lives") == "stopped")


def test_a_client_that_does_not_read_is_dropped(place):
    run = make_run(place.runs_dir, "slow", steps=2)
    from scripts.dashboard import follow

    client, text = follow.Client(), "x"
    for _ in range(follow.QUEUE_MESSAGES + 1):
        client.offer(text)
    assert client.dropped and client.queue.qsize() == follow.QUEUE_MESSAGES
    with place.connect("slow", max_queue=1, close_timeout=0.2) as lazy, place.connect("slow") as keen:
        heard = []
        for batch in range(5):
            write_records(run, [record(3 + batch, note="y" * 1000)], "a")
            while all_steps(heard)[-1:] != [3 + batch]:
                heard.append(json.loads(keen.recv(timeout=5)))
        assert lazy.recv(timeout=5)


def test_one_real_run_by_torchrun_is_paused_resumed_and_stopped(tmp_path):
    from scripts.dashboard.jobs import torchrun

    rows = write_rows(tmp_path / "rows.jsonl")
    with served(tmp_path / "runs", torchrun) as place:
        flags = {**TINY, "epochs": 5000, "data_path": str(rows), "cache_dir": str(tmp_path / "cache"), "keep_last": 2}
        flags |= {"save_dir": str(place.runs_dir / "real"), "processes": 2, "save_interval": "100000"}
        assert place.post("/runs", flags).status_code == 201

        def step():
            return place.get("/runs/real/progress")["step"] or 0

        place.wait_for(lambda: step() > 3, 90)
        assert place.status("real") == "running"
        assert place.post("/runs/real/pause").status_code == 202
        place.wait_for(lambda: place.status("real") == "paused")
        stood = step()
        time.sleep(1)
        assert step() == stood
        assert place.post("/runs/real/resume").status_code == 202
        place.wait_for(lambda: step() > stood)
        assert place.post("/runs/real/stop").status_code == 202
        place.wait_for(lambda: place.status("real") == "stopped")
        assert place.get("/runs/real")["checkpoints"]
        assert place.get("/runs/real/config")["processes"] == 2
