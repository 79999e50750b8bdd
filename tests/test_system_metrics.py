"""What the machine does is told beside the curves, by a thread that changes nothing of the run."""

import os
import sys
import threading
import time
import types

import pytest

from tests.small_world import log_of, records_of, result_of, train, write_rows
from training.control.watchdog import Watchdog
from training.diagnosis.alerts import AlertBook
from training.records.run_log import Meter, RunRecords, StateFile
from training.records.system import SystemWatch, visible_gpus
from training.schedule.train_state import LoopState

PLAIN = {"system/ram_used_gib", "system/ram_percent", "system/cpu_percent", "system/disk_free_gib"}


class FakeNvml(types.ModuleType):
    """Two GPUs of a machine, the second a slice that knows neither its use nor its power."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, shares):
        super().__init__("pynvml")
        self.shares = iter(shares)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return 1

    def _only_first(self, handle):
        if handle:
            raise RuntimeError("Not Supported")

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._only_first(handle)
        return types.SimpleNamespace(gpu=next(self.shares))

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=(handle + 1) * 2**30)

    def nvmlDeviceGetTemperature(self, handle, _sensor):
        return 40

    def nvmlDeviceGetPowerUsage(self, handle):
        self._only_first(handle)
        return 250_000


def wait_for(get, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (value := get()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)
    return value


def test_figures_come_again_and_again_and_each_is_taken_once(tmp_path):
    watch = SystemWatch(tmp_path, gpus=0, seconds=0.05)
    watch.start()
    first = wait_for(watch.take)
    assert first.keys() == PLAIN and first["system/ram_used_gib"] > 0.01 and first["system/disk_free_gib"] > 0
    assert 0 <= first["system/ram_percent"] <= 100
    wait_for(watch.take)
    watch.close()
    wait_for(lambda: not any(thread.name == "system figures" for thread in threading.enumerate()))
    watch.take()
    time.sleep(0.15)
    assert watch.take() == {} and watch.take_gpu_utilization() is None


def test_gpus_say_what_they_know(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([10, 30, 80]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-5,7")
    watch = SystemWatch(tmp_path, gpus=2)
    watch.seconds = 0.05
    watch.start()
    figures = wait_for(watch.take)
    watch.close()
    assert {name: value for name, value in figures.items() if "gpu" in name} == {
        "system/gpu0/utilization": 10.0, "system/gpu0/memory_used_gib": 1.0, "system/gpu0/temperature": 40.0,
        "system/gpu0/power_watts": 250.0, "system/gpu1/memory_used_gib": 2.0, "system/gpu1/temperature": 40.0,
    }  # fmt: skip


def test_utilization_is_the_mean_since_the_last_epoch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([10, 30, 80]))
    monkeypatch.setattr("training.records.system.GPU_SECONDS", 0.01)
    watch = SystemWatch(tmp_path, gpus=1)
    watch.start()
    wait_for(lambda: len(watch._since_epoch) == 3)
    watch.close()
    assert watch.take_gpu_utilization() == 40.0 and watch.take_gpu_utilization() is None


def test_no_package_and_no_driver_are_no_failure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert SystemWatch(tmp_path, gpus=2).look().keys() == PLAIN


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, ["0", "1"]), ("", 1, []), ("3, 5", 1, ["3"]), ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"])],
)
def test_only_the_gpus_of_the_job_are_told(monkeypatch, visible, count, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus(count) == names


class Watched:
    """Figures a hundred times as often as usual, and steps slow enough that some come."""

    def __call__(self, objective, rank):
        import training.records.run_log

        original = training.records.run_log.SystemWatch
        training.records.run_log.SystemWatch = lambda *args: original(*args, seconds=0.02)

        def slow(model, batch):
            time.sleep(0.01)
            return objective(model, batch)

        return slow


def test_no_bit_of_a_run_depends_on_being_watched(tmp_path):
    flags = {"data_path": str(write_rows(tmp_path / "rows.jsonl")), "num_workers": 1}
    assert train(2, tmp_path / "plain", **flags) == [0, 0], log_of(tmp_path / "plain")
    assert train(2, tmp_path / "watched", wrap_objective=Watched(), **flags) == [0, 0], log_of(tmp_path / "watched")
    assert result_of(tmp_path / "plain") == result_of(tmp_path / "watched")
    figures = records_of(tmp_path / "watched", "system")
    assert len(figures) >= 3 and figures[0].keys() == {"step", "time", "kind", *PLAIN}
    steps = [record["step"] for record in figures]
    assert steps == sorted(set(steps)), "one per step at most"
    epochs = records_of(tmp_path / "watched", "epoch")
    assert all(epoch["gpu_utilization"] is None and epoch["memory_usage"] > 2**20 for epoch in epochs)


def test_a_pause_is_neither_in_the_rates_nor_in_the_time_of_an_epoch():
    meter = Meter()
    meter.count(100, 50)
    with meter.paused(idle=True):
        time.sleep(0.3)
    assert meter.epoch_seconds() < 0.2 and meter.rates()["train/tokens_per_second"] > 500
    with meter.paused():
        time.sleep(0.3)
    assert meter.epoch_seconds() > 0.25, "a validation is part of its epoch"


def test_the_state_is_renewed_once_a_second_and_at_once_where_it_changes(tmp_path):
    file = StateFile(tmp_path / "state.json")
    file.update(status="running", step=1)
    first = os.stat(file.path).st_mtime_ns
    file.update(step=2)
    assert os.stat(file.path).st_mtime_ns == first
    file.update(status="pausing")
    assert os.stat(file.path).st_mtime_ns > first
    file._written_at -= 1.0
    file.update(step=3)
    assert '"step": 3' in file.path.read_text()


def test_every_beat_of_a_running_loop_is_heard_of(tmp_path):
    plan = types.SimpleNamespace(total_steps=9, epochs=1, stage_of=lambda epoch: 0)
    records, path = (
        RunRecords(tmp_path, True, (1.0, 1.0), "cpu", 1, AlertBook(tmp_path / "alerts.jsonl")),
        tmp_path / "state.json",
    )
    watchdog = Watchdog(100.0, on_hang=print, on_beat=records.alive)
    watchdog.beat()
    assert not path.exists(), "nothing is under way yet"
    with records.running(LoopState(), plan):
        for _ in range(2):  # a micro-batch, a batch of a validation, a look of a paused run
            before = records.state_file._written_at = records.state_file._written_at - 1.0
            watchdog.beat()
            assert records.state_file._written_at > before + 1.0
    records.close("completed")
