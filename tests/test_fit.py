"""What makes a run fit into memory: a batch size that is found, weights in bfloat16."""

import contextlib
import json
import math
import resource

import pytest
import torch
import yaml

from dataset.rows import collate, longest_row
from model.build import ModelRequest, choose_model
from scripts.plot_schedule import plan_of
from tests.small_world import answers_of, log_of, records_of, result_of, resume_from, train
from tests.tiny_model import foreign, pack, tokens
from training.checkpoints.checkpointer import open_shards
from training.config.config import AUTO, Config, make_config
from training.config.flags import ConfigError
from training.config.stages import read_stages
from training.run.batch_size import most_rows, rows_that_fit, settle, wants_fit

CPU = torch.device("cpu")


# --- the batch size


def find(rank, answer, needed_bytes, free_bytes):
    """The rows that fit where a row takes so many bytes and so many are free, by real allocations."""
    import psutil

    before, tried = resource.getrlimit(resource.RLIMIT_AS), []
    memory = psutil.virtual_memory()
    psutil.virtual_memory = lambda: memory._replace(available=free_bytes)
    model = torch.nn.Linear(4, 4)

    def loss_of_rows(rows):
        tried.append(rows)
        taken = torch.empty(rows * needed_bytes, dtype=torch.uint8)
        return model(torch.ones(4)).sum() + 0 * taken[0]

    try:
        found = rows_that_fit(loss_of_rows, model, 48, Config(), CPU)
    except ValueError as error:
        found = str(error)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and model.weight.grad is None
    answer((found, tried))


@pytest.mark.parametrize(
    ("free_bytes", "expected"), [(2**34, (48, [1, 48])), (2**30, (6, [1, 48, 24, 12, 6])), (2**27, None)]
)
def test_rows_are_halved_until_memory_holds_them(free_bytes, expected):
    """128 MiB for each row; a sixteenth of what is free is spared."""
    ((found, tried),) = answers_of(find, 1, 2**27, free_bytes)
    if expected is None:
        assert tried == [1, 48, 24, 12, 6, 3, 1] and "not even one row fits" in found
    else:
        assert (found, tried) == expected


def test_frozen_weights_need_no_room_later(monkeypatch):
    kept = []
    monkeypatch.setattr(
        "training.run.batch_size._tight", lambda later, device: kept.append(later) or contextlib.nullcontext()
    )
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 1, bias=False))
    model[0].requires_grad_(False)
    settings = {"lora_rank": 4, "from_weight": "somewhere", "param_dtype": "bfloat16", "dtype": "bfloat16"}
    rows_that_fit(lambda rows: model(torch.ones(rows, 1000)).sum(), model, 8, make_config(settings), CPU)
    assert kept == [1000 * 2 * 4], "two moments of float32"


def test_a_first_row_that_does_not_fit_is_told_alike():
    def fails(rows):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(ValueError, match="not even one row fits"):
        rows_that_fit(fails, torch.nn.Linear(2, 2), 8, Config(), CPU)


def test_a_plan_without_a_run_needs_a_number():
    with pytest.raises(ValueError, match="--batch_size auto: the number is found when a run starts"):
        plan_of(make_config({"batch_size": "auto"}), 1)


def test_another_error_is_no_lack_of_memory():
    def fails(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        rows_that_fit(fails, torch.nn.Linear(2, 2), 8, Config(), CPU)


def test_what_is_tried_is_as_large_as_rows_get():
    batch = collate([longest_row(100, 30)] * 2)
    assert batch["document_lengths"] == [29, 29, 29, 9] * 2
    assert len(batch["targets"]) == len(batch["input_ids"]) == 192
    assert collate([longest_row(61, 30)])["document_lengths"] == [29, 29, 1]
    assert collate([longest_row(60, 30)])["document_lengths"] == [29, 29]


def test_auto_stands_for_zero_and_gives_way_to_what_was_found():
    config = make_config({"batch_size": "auto"})
    assert config.batch_size == AUTO and make_config({"batch_size": "0"}) == config
    assert make_config(yaml.safe_load(config.to_yaml())) == config and "batch_size: auto\n" in config.to_yaml()
    config = make_config({"batch_size": "auto", "stages": '[{"name": "a"}, {"name": "b", "batch_size": 3}]'})
    stages = read_stages(config)
    assert wants_fit(config, stages) and most_rows(stages, 1000, 2) == 64 and most_rows(stages, 9, 2) == 5
    config, stages = settle(config, stages, 7)
    assert (config.batch_size, [stage.config.batch_size for stage in stages]) == (7, [7, 3])
    assert not wants_fit(config, stages)
    with pytest.raises(ConfigError, match="--batch_size auto tries until memory runs out"):
        Config(batch_size=AUTO, strategy="fsdp")
    with pytest.raises(ConfigError, match="batch_size auto is for all that give no number"):
        read_stages(make_config({"stages": '[{"batch_size": "auto"}]'}))
    with pytest.raises(ConfigError, match="--batch_size many: not a whole number"):
        make_config({"batch_size": "many"})


def tight_memory(objective, rank):
    """An objective that runs out of memory beyond 128 tokens on rank 0, and beyond 256 on the others."""

    def tight(model, batch):
        if len(batch["input_ids"]) > 128 * (1 + rank):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return objective(model, batch)

    return tight


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_found_number_is_recorded_and_kept(tmp_path, rows, world_size):
    """Of rows of 64 tokens two fit on rank 0, and four elsewhere: all take two, also where a resume could take more."""
    flags = {"data_path": str(rows), "batch_size": "auto", "wrap_objective": tight_memory, "max_steps": 4}
    assert train(world_size, tmp_path / "whole", **flags) == [0] * world_size, log_of(tmp_path / "whole")
    assert "--batch_size auto: 2 rows per process" in log_of(tmp_path / "whole")
    written = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert (written["batch_size"], written["global_batch_size"]) == (2, 2 * world_size)

    copy = resume_from(tmp_path / "whole", 2, tmp_path / "copy")
    flags["wrap_objective"] = None
    assert train(world_size, copy, from_resume="1", **flags) == [0] * world_size, log_of(copy)
    assert result_of(copy) == result_of(tmp_path / "whole")

    other = resume_from(tmp_path / "whole", 2, tmp_path / "other")  # more fit now, and the rows of a step stay
    assert train(3 - world_size, other, from_resume="1", **flags) == [0] * (3 - world_size), log_of(other)
    state = json.loads((other / "checkpoints" / "step-00000004" / "trainer_state.json").read_text())
    assert state["global_batch_size"] == [2 * world_size]
    assert state["config"]["batch_size"] == {1: 9, 2: 5}[3 - world_size]  # its part of all nine rows


# --- weights in bfloat16


def bytes_of(checkpoint, kind):
    return sum(path.stat().st_size for path in checkpoint.glob(f"{kind}-*.safetensors"))


@pytest.mark.parametrize(
    ("world_size", "strategy", "more"),
    [
        (1, "ddp", {"ema_decay": 0.9}), (2, "fsdp", {"gradient_checkpointing": 1}),
        pytest.param(2, "ddp", {}, marks=pytest.mark.slow),
        pytest.param(1, "ddp", {"optimizer": "adafactor"}, marks=pytest.mark.slow),
        pytest.param(1, "ddp", {"optimizer": "muon", "use_moe": 1}, marks=pytest.mark.slow),
        pytest.param(3, "fsdp", {"ema_decay": 0.9}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_bfloat16_halves_a_checkpoint_and_resumes_exactly(tmp_path, rows, world_size, strategy, more):
    flags = {"data_path": str(rows), "strategy": strategy, "dtype": "auto", "hidden_size": 64, "max_steps": 4, **more}
    half = {**flags, "param_dtype": "bfloat16"}
    assert train(world_size, tmp_path / "whole", **half) == [0] * world_size, log_of(tmp_path / "whole")
    copy = resume_from(tmp_path / "whole", 2, tmp_path / "copy")
    assert train(world_size, copy, from_resume="1", **half) == [0] * world_size, log_of(copy)
    assert result_of(copy) == result_of(tmp_path / "whole")

    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000004"
    weights, moments = open_shards(checkpoint, "model"), open_shards(checkpoint, "optimizer")
    assert set(weights.dtypes.values()) == {torch.bfloat16}
    kept = {moments.dtypes[name] for name, shape in moments.shapes.items() if len(shape)}
    assert kept == {torch.bfloat16}
    values = sum(math.prod(shape) for reader in (weights, moments) for shape in reader.shapes.values())
    assert bytes_of(checkpoint, "model") + bytes_of(checkpoint, "optimizer") < 2.1 * values  # with the headers
    if more.get("ema_decay"):
        assert set(open_shards(checkpoint, "ema").dtypes.values()) == {torch.float32}
    assert json.loads((checkpoint / "trainer_state.json").read_text())["identity"]["precision"] == (
        "bfloat16, weights bfloat16"
    )


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_goes_on_in_another_type_where_that_is_allowed(tmp_path, rows, types):
    run, flags = tmp_path / "run", {"data_path": str(rows), "dtype": "bfloat16", "max_steps": 4, "ema_decay": 0.9}
    assert train(1, run, param_dtype=types[0], **flags) == [0]
    cut = resume_from(run, 2, tmp_path / "cut")
    flags |= {"param_dtype": types[1], "from_resume": "1"}
    assert train(1, cut, **flags) == [2] and "--allow_change precision" in log_of(cut)
    assert train(1, cut, **flags, allow_change="precision") == [0], log_of(cut)
    checkpoint = cut / "checkpoints" / "step-00000004"
    for kind in ("model", "optimizer"):
        reader = open_shards(checkpoint, kind)
        kept = {reader.dtypes[name] for name, shape in reader.shapes.items() if len(shape)}
        assert kept == {getattr(torch, types[1])}, kind
    losses = [records_of(each, "train")[-1]["train/loss"] for each in (run, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_weights_are_read_right_into_bfloat16(tmp_path):
    """The same numbers as a cast of all of them would give, from the seed and from files, built in and foreign."""
    foreign(tmp_path / "foreign", "GPTNeoX")
    foreign(tmp_path / "own", "Llama")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for source, wanted in (("none", shape), (str(tmp_path / "own"), {}), (str(tmp_path / "foreign"), {})):
        wide = choose_model(ModelRequest(source, wanted), 97)
        half = choose_model(ModelRequest(source, wanted, param_dtype="bfloat16"), 97)
        for one, other in zip(wide.parameters(), half.parameters(), strict=True):
            assert other.dtype == torch.bfloat16 and torch.equal(one.bfloat16(), other)
        assert torch.get_default_dtype() == torch.float32


def test_an_average_of_bfloat16_weights_keeps_what_they_round_away():
    from training.run.ema import Ema

    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = Ema(model, optimizer, 0.999, lambda t: (t.detach(), (0,) * t.dim()), lambda: 10**6, lambda: None)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer.step()
    assert ema.weights["weight"].item() == pytest.approx(1.001)
    with ema.in_place():
        assert model.weight.item() == 1.0
    assert model.weight.item() == 2.0 and ema.weights["weight"].item() == pytest.approx(1.001)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arithmetic_that_such_weights_cannot_have_is_refused(dtype):
    with pytest.raises(ConfigError, match="--param_dtype bfloat16 goes with --dtype bfloat16 or auto"):
        Config(dtype=dtype, param_dtype="bfloat16")


# --- layers recomputed and the head in chunks, for families of transformers


def test_recomputation_and_chunks_change_no_gradient_of_another_family(tmp_path, monkeypatch):
    import model.losses
    from model.loading import load_model
    from model.losses import sft_objective

    foreign(tmp_path, "GPTNeoX")
    batch, results, forwards = pack([tokens(9, 1), tokens(30, 2)]), [], []
    for lean in (False, True):
        network = load_model(tmp_path).double().train()
        if lean:
            network.enable_gradient_checkpointing()
            monkeypatch.setattr(model.losses, "MAX_LOGITS", 97 * 7)
        forwards.append(0)

        def count(*_):
            forwards[-1] += 1

        for part in network.modules():
            if type(part).__name__ == "GPTNeoXMLP":
                part.register_forward_pre_hook(count)
        loss = sft_objective(network, batch)["ce"]
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in network.parameters())])
    for plain, lean in zip(*results, strict=True):
        assert (plain - lean).abs().max() <= 1e-12
    assert forwards == [2, 4]
