"""The optimizers by name: what they compute, what decay pulls on, and that they go on from saved state as before."""

import pytest
import torch
from safetensors.torch import load_file

from model.losses import sft_objective
from tests.small_world import log_of, resume_from, run_ranks, train, without_events
from tests.tiny_model import SHAPE, pack, tokens
from trainer_utils import Processes, blocks_to_write, named_optimizer_state, named_weights
from training.checkpoints.checkpointer import load_checkpoint
from training.checkpoints.tensor_files import ShardReader, write_shard
from training.config import Config, make_config
from training.config.flags import ConfigError
from training.run.optimizers import make_optimizer

ALONE = Processes(0, 0, 1, torch.device("cpu"))
CASES = {
    "adamw": {"optimizer": "adamw"},
    "adamw, amsgrad": {"optimizer": "adamw", "amsgrad": True},
    "adam": {"optimizer": "adam"},
    "adam, amsgrad": {"optimizer": "adam", "amsgrad": True},
    "sgd": {"optimizer": "sgd"},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
}
every_optimizer = pytest.mark.parametrize("name", CASES)


def world(name: str, **flags):
    """A tiny decoder in training, untied, and its optimizer."""
    from model.decoder import DecoderConfig
    from model.loading import build_model

    model = build_model(DecoderConfig(**SHAPE, tie_word_embeddings=False), 0).train()
    return model, make_optimizer(model, Config(**{"learning_rate": 0.01, "weight_decay": 0.1, **CASES[name], **flags}))


def walk(model, optimizer, steps, scaler=None, factor=1.0) -> None:
    """Updates by the gradients of step numbers, as train_step makes them."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / step
        batch = pack([tokens(12, 10 * step + n) for n in range(3)])
        scaler.scale(sft_objective(model, batch)["ce"] * (factor / 33)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# What they compute


class OneMatrix(torch.nn.Module):
    """A model of one layer, whose gradients a test sets by hand."""

    def __init__(self, rows=3, columns=5):
        super().__init__()
        numbers = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(rows, columns, generator=numbers, dtype=torch.float64))
        self.norm = torch.nn.Parameter(torch.randn(columns, generator=numbers, dtype=torch.float64))

    def shard_units(self):
        return [self]

    def gradients(self, step):
        """Large ones first, so that amsgrad's maximum is not the mean."""
        numbers, scale = torch.Generator().manual_seed(step), 10.0 ** (2 - step)
        return [torch.randn(p.shape, generator=numbers, dtype=torch.float64) * scale for p in self.parameters()]


def updated(steps=4, **flags) -> OneMatrix:
    model = OneMatrix()
    optimizer = make_optimizer(model, Config(learning_rate=0.01, weight_decay=0.1, **flags))
    for step in range(1, steps + 1):
        for parameter, gradient in zip(model.parameters(), model.gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return model


def by_formula(update, steps=4) -> list[torch.Tensor]:
    """Parameters after `update(weight, gradient, memory, step, decay) -> weight`, decay 0 for what is no matrix."""
    model, results = OneMatrix(), []
    for place, weight in enumerate(p.detach().clone() for p in model.parameters()):
        memory: dict = {}
        for step in range(1, steps + 1):
            weight = update(weight, model.gradients(step)[place], memory, step, 0.1 if weight.dim() == 2 else 0.0)
        results.append(weight)
    return results


def assert_follows(model, update, steps=4):
    for parameter, expected in zip(model.parameters(), by_formula(update, steps), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_by_their_formulas(name, amsgrad):
    """Kingma & Ba 2015, Loshchilov & Hutter 2019 for decay, Reddi et al. 2018 for the maximum."""

    def update(weight, gradient, memory, step, decay):
        if name == "adamw":
            weight = weight * (1 - 0.01 * decay)
        else:
            gradient = gradient + decay * weight
        memory["mean"] = 0.8 * memory.get("mean", 0.0) + 0.2 * gradient
        memory["square"] = 0.95 * memory.get("square", 0.0) + 0.05 * gradient**2
        memory["largest"] = torch.maximum(memory.get("largest", torch.zeros_like(weight)), memory["square"])
        square = memory["largest" if amsgrad else "square"] / (1 - 0.95**step)
        return weight - 0.01 * memory["mean"] / (1 - 0.8**step) / (square.sqrt() + 1e-3)

    flags = {"optimizer": name, "amsgrad": amsgrad, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-3}
    assert_follows(updated(**flags), update)
    assert not torch.equal(updated(**flags).weight, updated(**flags | {"amsgrad": not amsgrad}).weight)


def test_sgd_by_its_formula():
    """Momentum without dampening, not Nesterov's; decay is an L2 penalty."""

    def update(weight, gradient, memory, step, decay):
        memory["mean"] = 0.7 * memory.get("mean", 0.0) + gradient + decay * weight
        return weight - 0.01 * memory["mean"]

    assert_follows(updated(optimizer="sgd", momentum=0.7), update)


def test_adafactor_by_its_formula():
    """Shazeer & Stern 2018 as torch has it: factored squares, relative step, updates clipped to root mean square 1."""

    def rms(tensor):
        return tensor.square().mean().sqrt().item()

    def update(weight, gradient, memory, step, decay):
        size, share = max(1e-3, rms(weight)), step**-0.8
        weight = weight * (1 - 0.01 * decay)
        squares = {"all": gradient**2}
        if weight.dim() == 2:
            squares = {"rows": (gradient**2).mean(1, keepdim=True), "columns": (gradient**2).mean(0, keepdim=True)}
        for kind, square in squares.items():
            memory[kind] = (1 - share) * memory.get(kind, 0.0) + share * square
        square = memory["rows"] * memory["columns"] / memory["rows"].mean() if weight.dim() == 2 else memory["all"]
        change = gradient / square.sqrt()
        return weight - min(0.01, step**-0.5) * size * change / max(1.0, rms(change))

    assert_follows(updated(optimizer="adafactor"), update)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest():
    model, optimizer = world("muon")
    before = weights_of(model)
    walk(model, optimizer, [1])
    for name, parameter in model.named_parameters():
        is_matrix_of_a_layer = "layers" in name and parameter.dim() == 2
        expected = {"momentum_buffer"} if is_matrix_of_a_layer else {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter].keys() == expected, name
        if is_matrix_of_a_layer:  # as large as an update of AdamW, whatever the shape: root mean square 0.2 of the rate
            change = parameter.detach() - before[name] * (1 - 0.01 * 0.1)
            assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3), name
    assert {type(part).__name__: len(part.param_groups) for part in optimizer.parts} == {"Muon": 1, "AdamW": 2}


def test_muon_needs_layers_with_matrices():
    model = OneMatrix()
    model.shard_units = list
    with pytest.raises(ValueError, match="--optimizer muon: the layers of this model hold no matrices"):
        make_optimizer(model, Config(optimizer="muon"))


@every_optimizer
def test_decay_pulls_on_matrices_only(name):
    model, optimizer = world(name, weight_decay=0.5)
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, before[key]), key
        elif name.startswith("adam") and not name.startswith("adamw"):  # the penalty's gradient, made a unit one
            torch.testing.assert_close(parameter.detach(), before[key] - 0.01 * before[key].sign(), rtol=0, atol=2e-3)
        else:
            torch.testing.assert_close(parameter.detach(), before[key] * (1 - 0.01 * 0.5), rtol=1e-6, atol=1e-7)


@every_optimizer
def test_the_learning_rate_is_that_of_every_group(name):
    model, optimizer = world(name)
    before = weights_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    sft_objective(model, pack([tokens(12, 1)]))["ce"].backward()
    optimizer.step()
    assert equal(weights_of(model), before)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))


@every_optimizer
def test_whoever_waits_for_a_step_is_told_once(name):
    model, optimizer = world(name)
    told = []
    optimizer.register_step_post_hook(lambda *_: told.append(weights_of(model)))
    walk(model, optimizer, [1, 2])
    assert len(told) == 2 and equal(told[1], weights_of(model))


# ---------------------------------------------------------------------------------------------------------------------
# Saved and restored


def save(directory, model, optimizer, without=""):
    """Checkpoint files, less the state of that key."""
    directory.mkdir()
    state = named_optimizer_state(model, optimizer)
    kinds = {"model": named_weights(model), "optimizer": {n: t for n, t in state.items() if n.split(":")[1] != without}}
    files = {kind: directory / f"{kind}.safetensors" for kind in kinds}
    for kind, named in kinds.items():
        write_shard(files[kind], blocks_to_write(named, ALONE, copy=False))
    return [ShardReader([path]) for path in files.values()]


def continued(directory, name, without="", steps=(1, 2, 3)):
    """Weights and state after `steps` and two more, from what was saved in between."""
    model, optimizer = world(name)
    walk(model, optimizer, steps)
    readers = save(directory, model, optimizer, without)
    fresh, restored = world(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_checkpoint(*readers, fresh, restored)
    walk(fresh, restored, [4, 5])
    return weights_of(fresh), named_optimizer_state(fresh, restored)


STATE_KEYS = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adamw, amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "adam, amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "sgd": {"momentum_buffer"},
    "sgd without momentum": set(),
    "adafactor": {"step", "row_var", "col_var", "variance"},
    "muon": {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"},
}


@every_optimizer
def test_saved_state_goes_on_with_the_same_bits(tmp_path, name):
    model, optimizer = world(name)
    walk(model, optimizer, [1, 2, 3, 4, 5])
    state = named_optimizer_state(model, optimizer)
    assert {key.split(":")[1] for key in state} == STATE_KEYS[name]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    weights, restored = continued(tmp_path / "whole", name)
    assert equal(weights, weights_of(model)) and equal(restored, state)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in STATE_KEYS.items() for key in sorted(keys)])
def test_without_any_part_of_the_state_the_bits_would_differ(tmp_path, name, key):
    """The negative control of the test above."""
    model, optimizer = world(name)
    walk(model, optimizer, [1, 2, 3, 4, 5])
    try:
        weights, _ = continued(tmp_path / "less", name, without=key)
    except (KeyError, AssertionError):
        return  # the optimizer itself misses it
    assert not equal(weights, weights_of(model))


@every_optimizer
def test_state_that_is_none_yet_can_be_saved(tmp_path, name):
    """As after a first step whose gradient was not finite."""
    model, optimizer = world(name)
    walk(model, optimizer, [4, 5])
    weights, restored = continued(tmp_path / "none", name, steps=())
    assert equal(weights, weights_of(model)) and equal(restored, named_optimizer_state(model, optimizer))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, {"optimizer": "muon", "dtype": "float16", "init": "kaiming"}),
        (1, {"optimizer": "adafactor"}),
        (2, {"optimizer": "sgd", "strategy": "fsdp"}),
        (2, {"optimizer": "adam", "amsgrad": True}),
    ],
    ids=lambda value: value["optimizer"] if isinstance(value, dict) else f"{value} ranks",
)
def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(tmp_path, rows, ranks, flags):
    flags = {"data_path": str(rows), "epochs": 1, **flags}
    assert train(ranks, tmp_path / "whole", **flags) == [0] * ranks, log_of(tmp_path / "whole")
    cut = resume_from(tmp_path / "whole", 4, tmp_path / "cut")
    assert train(ranks, cut, from_resume="1", **flags) == [0] * ranks, log_of(cut)
    assert "resumed from" in log_of(cut)
    assert without_events(cut) == without_events(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# With the loss scale of fp16


@every_optimizer
def test_a_scaled_loss_gives_the_same_bits(name):
    results = []
    for scale in (None, 2.0**10):  # a power of two, so that scaling is exact
        model, optimizer = world(name)
        walk(model, optimizer, [1, 2, 3], scale and torch.amp.GradScaler("cpu", init_scale=scale))
        results.append(weights_of(model))
    assert equal(*results)


@every_optimizer
def test_an_overflow_leaves_weights_and_state_alone(name):
    model, optimizer = world(name)
    walk(model, optimizer, [1])
    before, state = weights_of(model), {k: v.clone() for k, v in named_optimizer_state(model, optimizer).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    walk(model, optimizer, [2], scaler, factor=1e38)
    assert equal(weights_of(model), before) and equal(named_optimizer_state(model, optimizer), state)
    assert scaler.get_scale() == 2.0**9
    walk(model, optimizer, [2], scaler)
    assert not equal(weights_of(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# Shared out over processes


def train_each(rank, directory, strategy):
    """Put float64 weights after four updates by each optimizer in files; every process has the same rows.

    Where the optimizer fails its error stands in a text file.
    """
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    from trainer_utils import Strategy, close_processes, parallelize, start_processes

    processes = start_processes(torch.device("cpu"), 60)
    for name in CASES:
        model, _ = world(name)
        model = model.double()
        filler = pack([tokens(3, 0)])
        parallel = parallelize(model, processes, Strategy(strategy), lambda m, f=filler: sft_objective(m, f)["ce"] * 0)
        optimizer = make_optimizer(model, Config(learning_rate=0.01, weight_decay=0.1, **CASES[name]))
        try:
            walk(parallel, optimizer, [1, 2, 3, 4])
            whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        except (NotImplementedError, RuntimeError) as error:
            (directory / f"{name}.txt").write_text(str(error))
            continue
        if rank == 0:
            save_file({n: p.detach().contiguous() for n, p in whole.items()}, directory / f"{name}.safetensors")
    close_processes(processes)


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """name -> largest difference between weights trained alone and by two processes, or the error of these."""
    places = {count: tmp_path_factory.mktemp(f"by{count}") for count in (1, 2)}
    for count, place in places.items():
        assert run_ranks(train_each, count, (place, "fsdp" if count == 2 else "ddp")) == [0] * count
    found = {path.stem: path.read_text() for path in places[2].glob("*.txt")}
    for path in places[2].glob("*.safetensors"):
        alone, shared = load_file(places[1] / path.name), load_file(path)
        found[path.stem] = max((alone[n] - shared[n]).abs().max().item() for n in alone)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("adafactor", "muon")])
def test_sharding_gives_the_same_update(differences, name):
    assert differences[name] <= 1e-12


def test_an_optimizer_is_refused_where_sharding_gives_another_update(differences):
    assert 1e-6 < differences["muon"] < 0.1, "where it is the same by now it could be allowed"
    assert "_NormPartial" in differences["adafactor"], "where torch can do it by now it could be allowed"
    for name in ("adafactor", "muon"):
        with pytest.raises(ConfigError, match=f"--optimizer {name} needs whole tensors"):
            make_config({"data_path": "x", "optimizer": name, "strategy": "fsdp"})


def test_amsgrad_belongs_to_adam():
    for name in ("sgd", "adafactor", "muon"):
        with pytest.raises(ConfigError, match="--amsgrad belongs to --optimizer adam or adamw"):
            make_config({"data_path": "x", "optimizer": name, "amsgrad": "1"})


def test_init_belongs_to_new_weights():
    with pytest.raises(ConfigError, match="--init xavier draws new weights, and --from_weight runs/x has some"):
        make_config({"data_path": "x", "init": "xavier", "from_weight": "runs/x"})
    assert make_config({"data_path": "x", "from_weight": "runs/x"}).adam_eps == 1e-8
