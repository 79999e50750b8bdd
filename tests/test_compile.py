"""Compiled layers: one set of graphs for all layers and lengths, the numbers of the plain ones, and exact resumes."""

import json
import signal

import pytest
import torch

from model.compile import compile_layers
from model.isolation import PACKED, check_isolation
from model.losses import sft_objective
from model.transformers_model import HFCausalLM
from tests.small_world import KillAtCall, answers_of, log_of, result_of, train, write_rows
from tests.test_lora import adapted, make_base
from tests.tiny_model import FILLER, foreign, pack, tiny, tokens

# torch warns of what it does itself while it traces, and hides that only where warnings are no errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

# Micro-batches of 15, 43, 1, 599 and 32 tokens in 2, 3, 1, 1 and 1 documents, some positions not supervised.
BATCHES = [
    pack([tokens(12, 1), tokens(5, 2)], lambda position: position % 3),
    pack([tokens(30, 3), tokens(7, 4), tokens(9, 5)]),
    FILLER,
    pack([tokens(600, 4)]),
    pack([tokens(33, 4)]),
]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def gradients_of(model, batches, dtype=torch.float32):
    """Loss and gradients of each batch, all from the same state of the generator."""
    results = []
    for batch in batches:
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = sft_objective(model, batch)["ce"]
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    return results


def compare(model, graphs, tolerance=2e-5, dtype=torch.float32, checkpointing=False):
    """Compile a model and hold it against what it computed before; no length may compile anything anew."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    names, model = list(model.state_dict()), model.train()
    plain = gradients_of(model, BATCHES, dtype)
    compile_layers(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    compiled = gradients_of(model, BATCHES[:1], dtype)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled += gradients_of(model, BATCHES[1:], dtype)
        with torch.no_grad():
            model.eval()
            sft_objective(model, BATCHES[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert list(model.state_dict()) == names
    for (loss, gradients), (expected, others) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)
        for ours, theirs in zip(gradients, others, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() * 10


def test_two_graphs_serve_all_layers_and_lengths():
    compare(tiny(num_hidden_layers=3, dropout=0.1), graphs=2, checkpointing=True)


@pytest.mark.slow
def test_experts_stay_outside():
    compare(tiny(num_hidden_layers=3, **EXPERTS), graphs=2)


@pytest.mark.slow
def test_under_autocast():
    compare(tiny(num_hidden_layers=3, dropout=0.1, qk_norm=True), graphs=2, tolerance=0.01, dtype=torch.bfloat16)


@pytest.mark.slow
def test_adapters_are_compiled_with_their_layers(tmp_path):
    model = adapted(make_base(tmp_path / "base", num_hidden_layers=3))
    compare(model, graphs=4)  # the first layer's input has no gradient


COMPILED = [
    ("Llama", {}, 2), ("GPTNeoX", {}, 2), ("Gemma3Text", {"sliding_window": 8}, 2), ("Olmo2", {}, 2),
    ("Qwen3Moe", EXPERTS, 1),
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "shape", "graphs"),
    # The last one computes documents side by side.
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in COMPILED), ("Bloom", {}, 0)],
)
def test_the_parts_of_other_families(tmp_path, family, shape, graphs, checkpointing):
    foreign(tmp_path, family, num_hidden_layers=3, **shape)
    model = HFCausalLM.from_pretrained(tmp_path)
    check_isolation(model)
    compare(model, graphs, checkpointing=checkpointing)


def test_what_is_compiled_sees_no_neighbour():
    assert [name for _, name in tiny(num_hidden_layers=1).token_wise_parts()] == ["before", "after"]
    assert [name for _, name in tiny(num_hidden_layers=1, **EXPERTS).token_wise_parts()] == ["before", "between"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trial_of_a_model_runs_nothing_compiled(tmp_path, monkeypatch, checkpointing):
    """Nor where a layer runs once more in the backward pass."""
    foreign(tmp_path / "model", "Mistral")
    model, called = HFCausalLM.from_pretrained(tmp_path / "model"), []
    monkeypatch.setattr(torch, "compile", lambda method, **_: lambda *tensors: called.append(method) or 1 / 0)
    compile_layers(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    check_isolation(model)
    assert model.reading == PACKED and not called
    with pytest.raises(ZeroDivisionError):
        sft_objective(model.train(), BATCHES[0])
    assert len(called) == 1


@pytest.mark.slow
def test_layers_that_all_differ_get_graphs_of_their_own(tmp_path, monkeypatch):
    """More than the 8 that torch keeps of a method if it is not told otherwise."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    adapters = ["q", "q", "k", "v", "qk", "qv", "kv", "qkv", ""]  # the first layer's input has no gradient
    targets = [f"{layer}.self_attn.{kind}_proj" for layer, kinds in enumerate(adapters) for kind in kinds]
    model = adapted(make_base(tmp_path / "base", num_hidden_layers=9), targets=",".join(targets)).train()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda method, **_: compiler(method, fullgraph=True, backend="eager"))
    compile_layers(model)
    sft_objective(model, BATCHES[0])["ce"].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9 + 2


def first_gradients(rank, answer, order):
    """The gradients of one batch in a process that has compiled for others before, whatever lies in caches."""
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    model = tiny().train()
    compile_layers(model)
    gradients_of(model, [BATCHES[i] for i in order])
    ((_, gradients),) = gradients_of(model, BATCHES[1:2])
    answer([gradient.double().sum().item() for gradient in gradients])


@pytest.mark.slow
def test_the_lengths_seen_first_leave_no_trace():
    assert answers_of(first_gradients, 1, [2, 0]) == answers_of(first_gradients, 1, [3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "strategy", "flags"),
    [
        (1, "ddp", {}), (1, "ddp", {"dtype": "bfloat16", "gradient_checkpointing": 1}), (2, "ddp", {}),
        (2, "ddp", {"use_moe": 1, "gradient_checkpointing": 1}), (2, "fsdp", {"dtype": "bfloat16"}),
        (2, "fsdp", {"gradient_checkpointing": 1}),
    ],
)  # fmt: skip
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, world_size, strategy, flags):
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    flags = {"data_path": str(rows), "val_data_path": str(rows), "strategy": strategy, "use_compile": 1, **flags}
    flags |= {"save_interval": "2", "batch_size": 2 // world_size, "epochs": 3}

    def run(name, **more):
        return train(world_size, tmp_path / name, timeout_seconds=280, **flags, **more)

    assert run("whole") == [0] * world_size, log_of(tmp_path / "whole")
    codes = run("cut", wrap_objective=KillAtCall(call=5, victim=world_size - 1))
    assert codes[world_size - 1] == -signal.SIGKILL and not (tmp_path / "cut" / "final").exists()
    assert run("cut", from_resume="1") == [0] * world_size, log_of(tmp_path / "cut")
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "whole")
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1]
    precision = json.loads((newest / "trainer_state.json").read_text())["identity"]["precision"]
    assert precision == f"{flags.get('dtype', 'float32')}, compiled"
