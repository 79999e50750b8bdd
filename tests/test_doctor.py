"""The doctor finds what a run would die of, on machines that nobody has, and lets good ones pass."""

import json
import os
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from scripts import doctor
from tests.small_world import TINY, log_of, train, write_rows
from training.config import Config
from training.control.process import out_of_memory
from training.diagnosis.machine import (
    ERROR,
    GIB,
    MIB,
    OK,
    WARN,
    Finding,
    Gpu,
    Machine,
    Sizes,
    check_clock,
    check_start,
    compiler_lacks,
    examine,
    look_around,
    memory_need,
    state_bytes,
)

H100 = Gpu("NVIDIA H100", 80 * GIB, 79 * GIB)
GOOD = Machine(
    python=(3, 12), packages={"torch": ("2.13.0+cpu", "2.13.0"), "wandb": ("0.31.0", "0.31.0")}, cores=16, threads=16,
    ram_bytes=64 * GIB, ram_free_bytes=60 * GIB, disk_free_bytes=500 * GIB, shm_free_bytes=8 * GIB, open_files=4096,
    gpus=(), clock=1.8e9,
)  # fmt: skip
SMALL = Sizes(30_000_000, 512, 8, 1664, 6400)
LARGE = Sizes(8_000_000_000, 4096, 32, 14336, 128_256)


def levels(config, machine=GOOD, sizes=SMALL, world_size=1, local=1):
    found = examine(config, machine, sizes, world_size, local)
    return {each.topic: each.level for each in found if each.level != OK}


def test_a_good_machine_has_no_findings_but_good_ones():
    assert levels(Config()) == {}
    assert levels(Config(), replace(GOOD, gpus=(H100,)), LARGE, 8, 8) != {}
    many = replace(GOOD, gpus=(H100,) * 8, threads=2)
    assert levels(Config(strategy="fsdp", batch_size=1), many, LARGE, 8, 8) == {}


def test_a_missing_compiler_is_told_before_a_run_that_needs_one(monkeypatch, tmp_path):
    machine = replace(GOOD, compiler_lacks=("g++",))
    assert levels(Config(batch_size=4), machine) == {}
    assert levels(Config(batch_size=4, use_compile=True), machine) == {"compiler": ERROR}
    assert levels(Config(batch_size=4, use_compile=True)) == {}
    assert compiler_lacks() == ()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler_lacks() == ("no-such-compiler",)
    with pytest.raises(ValueError, match=r"which lacks no-such-compiler; apt-get install g\+\+ python3-dev"):
        check_start(Config(save_dir=str(tmp_path), use_compile=True), None, 1)


def test_weights_in_half_the_bytes_take_half_the_room():
    wide, half = Config(), Config(param_dtype="bfloat16")
    assert state_bytes(half, 1000) * 2 == state_bytes(wide, 1000) == 12_000
    assert state_bytes(replace(half, ema_decay=0.9), 1000) == 10_000
    assert memory_need(half, LARGE, 1, True).certain * 2 == memory_need(wide, LARGE, 1, True).certain


@pytest.mark.parametrize(
    ("change", "topic", "level"),
    [
        ({"python": (3, 10)}, "python", ERROR),
        ({"packages": {"torch": ("2.9.1+cu128", "2.13.0")}}, "packages", ERROR),
        ({"packages": {"safetensors": (None, "0.8.0")}}, "packages", ERROR),
        ({"packages": {"plotly": (None, "7.1.0")}}, "packages", WARN),
        ({"packages": {"torch": ("2.12.0", "2.13.0")}}, "packages", WARN),
        ({"ram_bytes": GIB // 4, "ram_free_bytes": GIB // 4}, "memory", ERROR),
        ({"ram_free_bytes": GIB}, "memory", WARN),
        ({"disk_free_bytes": 100 * MIB}, "disk", ERROR),
        ({"disk_free_bytes": GIB}, "disk", WARN),
        ({"threads": 2}, "threads", WARN),
        ({"open_files": 256}, "limits", WARN),
        ({"clock": 3600.0}, "clock", WARN),
    ],
)
def test_each_lack_is_found_alone_and_has_a_remedy(change, topic, level):
    machine = replace(GOOD, **change)
    assert levels(Config(batch_size=4), machine) == {topic: level}
    (finding,) = [each for each in examine(Config(batch_size=4), machine, SMALL, 1, 1) if each.level != OK]
    assert finding.words and finding.remedy


def test_processes_share_memory_and_cores():
    four = replace(GOOD, ram_free_bytes=6 * GIB)
    assert levels(Config(batch_size=1), four) == {}
    assert levels(Config(batch_size=1), four, world_size=8, local=8) == {"memory": WARN, "threads": WARN}
    assert levels(Config(batch_size=1), replace(GOOD, threads=4), world_size=4, local=4) == {}


def test_workers_need_shared_memory():
    docker = replace(GOOD, shm_free_bytes=64 * MIB)
    assert levels(Config(), docker) == {}
    assert levels(Config(num_workers=16, prefetch_factor=8), docker) == {"shared memory": WARN}
    assert levels(Config(num_workers=16), replace(GOOD, shm_free_bytes=None)) == {}


def test_a_gpu_is_the_memory_that_counts():
    small_gpu = replace(GOOD, gpus=(Gpu("T4", 15 * GIB, 14 * GIB),))
    assert levels(Config(batch_size=1), small_gpu, LARGE)["memory"] == ERROR
    assert "memory" not in levels(Config(batch_size=1), small_gpu, SMALL)
    assert levels(Config(device="cpu"), replace(small_gpu, ram_free_bytes=GIB), SMALL) == {"memory": WARN}


def test_what_a_model_takes_is_what_it_holds():
    parameters, config = 1000, Config(device="cpu", dtype="float32")
    sizes = Sizes(parameters, 8, 2, 16, 100)
    assert state_bytes(config, parameters) == 12 * parameters, "weights and two moments in float32"
    assert state_bytes(Config(amsgrad=True, ema_decay=0.9), parameters) == 20 * parameters
    assert state_bytes(Config(optimizer="adafactor"), parameters) == 4 * parameters
    assert memory_need(config, sizes, 4, False).certain == 16 * parameters, "with the gradients"
    sharded = Config(strategy="fsdp", dtype="float32")
    assert memory_need(sharded, sizes, 4, False).certain == 4 * parameters
    assert memory_need(Config(strategy="fsdp", shard_size=2), sizes, 4, False).certain == 8 * parameters
    assert memory_need(Config(strategy="fsdp", cpu_offload=True), sizes, 4, True).certain == 0


def test_the_ways_to_take_less_do():
    plain = memory_need(Config(), LARGE, 1, True).roughly
    for less in ({"gradient_checkpointing": True}, {"batch_size": 8}, {"max_seq_len": 512}):
        assert memory_need(Config(**less), LARGE, 1, True).roughly < plain, less
    assert memory_need(Config(dtype="float32"), SMALL, 1, True).roughly > memory_need(Config(), SMALL, 1, True).roughly
    assert memory_need(Config(strategy="fsdp"), LARGE, 8, True).roughly < plain


def test_a_clock_that_differs_from_that_of_the_disk_is_told():
    assert [each.level for each in check_clock(GOOD, GOOD.clock + 1)] == [OK]
    (finding,) = check_clock(GOOD, GOOD.clock - 3600)
    assert finding.level == WARN and "-3600 s" in finding.words


def test_the_facts_of_this_machine_are_gathered_quickly(tmp_path):
    look_around(tmp_path)
    started = time.thread_time()
    machine = look_around(tmp_path / "not" / "there" / "yet")
    assert time.thread_time() - started < 0.3
    assert machine.packages["torch"][0] == torch.__version__ or machine.packages["torch"][0]
    assert machine.ram_bytes >= machine.ram_free_bytes > 0 and machine.disk_free_bytes > 0
    assert not (tmp_path / "not").exists()


def test_a_start_warns_and_refuses_only_what_is_certain(tmp_path, monkeypatch, caplog):
    sizes, config = vars(SMALL), Config(save_dir=str(tmp_path / "run"), batch_size=4)
    monkeypatch.setattr(
        "training.diagnosis.machine.look_around", lambda _: replace(GOOD, disk_free_bytes=MIB, threads=1)
    )
    check_start(config, sizes, 1)
    assert "disk: 4 checkpoints" in caplog.text and "threads: 1 process" in caplog.text
    monkeypatch.setattr("training.diagnosis.machine.look_around", lambda _: replace(GOOD, ram_bytes=GIB // 4))
    with pytest.raises(ValueError, match=r"memory: .*take 458 MiB, this host has 256 MiB; try .*--skip_checks 1"):
        check_start(config, sizes, 1)
    check_start(config, None, 1)


class TooSmall:
    """A host without memory for any model; with `then`, an objective that finds none left."""

    def __init__(self, then=None):
        self.then = then

    def __call__(self, objective, rank):
        import training.diagnosis.machine

        original = training.diagnosis.machine.look_around
        if not self.then:
            training.diagnosis.machine.look_around = lambda place: replace(original(place), ram_bytes=1000, gpus=())

        def exhausted(model, batch):
            if self.then and model.training:
                raise self.then
            return objective(model, batch)

        return exhausted


def test_a_run_that_cannot_fit_ends_before_its_data_is_read(tmp_path):
    flags = {"data_path": str(tmp_path / "none.jsonl")}
    assert train(1, tmp_path / "run", wrap_objective=TooSmall(), **flags) == [2]
    assert "error: memory: weights, gradients and optimizer take" in log_of(tmp_path / "run")
    assert train(1, tmp_path / "run", wrap_objective=TooSmall(), **flags, skip_checks=True) != [0]
    assert "none.jsonl" in log_of(tmp_path / "run")


CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "81920 bytes. Error code 12 (Cannot allocate memory)"
)


def test_no_memory_left_is_one_line_that_names_the_flags(tmp_path):
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    assert train(1, tmp_path / "run", wrap_objective=TooSmall(RuntimeError(CPU_WORDS)), data_path=rows) == [70]
    (line,) = [line for line in log_of(tmp_path / "run").splitlines() if "out of memory" in line]
    flags = ("--batch_size", "--gradient_checkpointing", "--max_seq_len", "--strategy fsdp", "--dtype")
    assert line.startswith("error: out of memory on the host") and all(flag in line for flag in flags)
    assert "Traceback" not in log_of(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "failed" and state["exit_reason"].startswith("out of memory") and state["exit_code"] == 70


def test_the_words_of_each_kind_of_exhaustion_are_known():
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of …")
    assert out_of_memory(gpu).startswith("out of memory on the GPU, which was asked for 2.50 GiB: lower --batch_size")
    assert out_of_memory(RuntimeError(CPU_WORDS)).startswith(
        "out of memory on the host, which was asked for 81920 bytes"
    )
    assert out_of_memory(MemoryError()).startswith("out of memory on the host: ")
    assert out_of_memory(RuntimeError("shapes differ")) is None and out_of_memory(ValueError("x")) is None


# ---------------------------------------------------------------------------------------------------------------------
# The program


def ask(capsys, *words):
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    code = doctor.main([*(f"--{name}={TINY[name]}" for name in shape), "--device=cpu", *words])
    return code, capsys.readouterr().out


def test_the_program_passes_a_good_run_and_leaves_nothing_behind(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    code, said = ask(capsys, f"--data_path={rows}", f"--save_dir={tmp_path}/runs/new", "--batch_size=1")
    assert code == 0, said
    assert f"ok     data: --data_path {rows}: its first rows are fine" in said
    assert "ok     devices: the CPU" in said and "ok     memory:" in said and "several nodes: start this" in said
    assert not (tmp_path / "runs" / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data_path=no/such.jsonl"], "error  data: --data_path no/such.jsonl"),
        (["--data_path=BAD"], "bad.jsonl:1: "),
        (["--data_path=ROWS", "--tokenizer=./no/where"], "error  model: no tokenizer in ./no/where"),
        (["--data_path=ROWS", "--save_dir=FILE/run"], "cannot be written to: Not a directory"),
    ],
)
def test_the_program_says_what_a_run_would_die_of(tmp_path, capsys, words, said, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    (tmp_path / "file").write_text("")
    places = {"ROWS": write_rows(tmp_path / "rows.jsonl"), "BAD": tmp_path / "bad.jsonl", "FILE": tmp_path / "file"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, printed = ask(capsys, f"--save_dir={tmp_path}/run", *words)
    assert code == 1 and said in printed and "       -> " in printed


def test_a_wrong_flag_ends_with_two(capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--epoch", "1"])
    assert stopped.value.code == 2


def meet(directories, seconds):
    """What node 0 hears when each node looks into its own idea of the directory."""
    others = [
        threading.Thread(target=doctor.meet_nodes, args=(place, number, len(directories), seconds))
        for number, place in enumerate(directories[1:], start=1)
    ]
    for other in others:
        other.start()
    answers = doctor.meet_nodes(directories[0], 0, len(directories), seconds)
    for other in others:
        other.join(timeout=30)
    return answers


def test_nodes_that_share_the_directory_find_each_other(tmp_path):
    stale = {"nonce": "of an earlier start", "time": 1.0}
    (tmp_path / ".doctor-0.json").write_text(json.dumps(stale))
    answers = meet([tmp_path] * 3, 20)
    assert answers.keys() == {1, 2} and all(0 <= gap < 20 for gap in answers.values())
    assert doctor.check_nodes(tmp_path, 3, answers)[0].level == OK
    assert not os.listdir(tmp_path)


def test_a_node_with_a_directory_of_its_own_is_named(tmp_path):
    places = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    (finding,) = doctor.check_nodes(places[0], 3, meet(places, 1.5))
    assert (finding.level, finding.words) == (ERROR, f"{places[0]} of node 0 is not seen by node 2")
    assert doctor.check_nodes(places[0], 2, {1: -90.0})[0] == Finding(
        WARN, "nodes", "the clock of node 1 is -90 s off", "set the clocks, best by NTP"
    )


def test_two_nodes_of_torchrun_agree(tmp_path):
    import subprocess

    from scripts.verify.ranks import free_port

    port, rows = free_port(), write_rows(tmp_path / "rows.jsonl")
    words = [f"--data_path={rows}", f"--save_dir={tmp_path}/run", "--device=cpu", "--batch_size=1", "--hidden_size=16"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_port"]
    nodes = [
        subprocess.Popen(
            [*launch, str(port), f"--node_rank={node}", "-m", "scripts.doctor", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert f"ok     nodes: 2 nodes share {tmp_path}/run and the time" in said[0]
