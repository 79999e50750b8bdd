"""LoRA: adapters learn like any weight, their base stays as it is to the bit, and what comes out is one model again."""

import ast
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.build import ModelRequest, choose_model, fill_model, sizes_of
from model.export import export_model
from model.loading import load_model
from model.losses import make_sft_objective, sft_objective
from scripts.checkpoints import main as checkpoints_script
from scripts.evaluate import main as evaluate
from tests.small_world import KillAtCall, log_of, records_of, result_of, sha256, train, write_rows
from tests.test_layout import FILES, imports_of
from tests.tiny_model import FILLER, foreign, logits_of, pack, tiny, tokens
from training.config.config import Config, ConfigError, make_config
from training.diagnosis.machine import Sizes, memory_need, state_bytes

TOKENIZER = Path(__file__).resolve().parent.parent / "model" / "tokenizer"
RANK = 4
LORA = {"rank": RANK, "alpha": 6, "targets": "", "dropout": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}
DOCUMENTS = [tokens(12), tokens(2, 2), tokens(30, 3)]


def make_base(directory: Path, family: str | None = None, seed: int = 0, **changes) -> Path:
    """A model to adapt: of transformers, or else the built-in one."""
    if family:
        foreign(directory, family, vocab_size=6400, **changes)
    else:
        export_model(directory, tiny(seed, vocab_size=6400, **changes), TOKENIZER)
    return directory


@pytest.fixture(scope="module")
def own_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "own")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "gemma", "Gemma2", sliding_window=8)


def request_of(base: Path, **changes) -> ModelRequest:
    return ModelRequest(str(base), lora={**LORA, **changes})


def adapted(base: Path, **changes):
    """The base with adapters that change its logits by as much as they are."""
    model = choose_model(request_of(base, **changes), 6400)
    numbers = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=numbers)
    return model


def flags_of(base: Path, rows: Path, **changes) -> dict:
    shape = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    builtin = "llama" in (base / "config.json").read_text()
    return {
        **shape, "data_path": str(rows), "from_weight": str(base), "tokenizer": str(TOKENIZER), "lora_rank": RANK,
        "dropout": 0.1 if builtin else 0.0, "lora_dropout": 0.1, **changes,
    }  # fmt: skip


def files_of(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256(path) for path in directory.rglob("*") if path.is_file()}


# --- what learns


def test_only_adapters_learn_and_a_new_one_changes_nothing(own_base):
    model, base = choose_model(request_of(own_base), 6400), load_model(own_base)
    batch = pack(DOCUMENTS)
    assert torch.equal(logits_of(model, batch), logits_of(base, batch)), "B is 0"
    sft_objective(model.train(), batch)["ce"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name
        assert ".lora_B." not in name or parameter.grad.abs().max() > 0
    model.zero_grad()
    sft_objective(model, FILLER)["ce"].backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad), "but there is one, as DDP needs"


@pytest.mark.parametrize("shape", [{}, EXPERTS])
def test_frozen_weights_leave_the_gradients_of_adapters_alone(tmp_path, shape):
    """What is written by hand in norms and experts skips the gradients that nobody wants."""
    model, batch, gradients = adapted(make_base(tmp_path / "base", **shape)), pack(DOCUMENTS), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in ("frozen", "not"):
        model.zero_grad()
        sft_objective(model.train(), batch)["ce"].backward()
        gradients.append([p.grad.clone() for p in trained])
        model.requires_grad_(True)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputing_layers_gives_the_same_gradients(own_base):
    gradients = []
    for recomputed in (False, True):
        model = adapted(own_base)
        if recomputed:
            model.enable_gradient_checkpointing()
        sft_objective(model.train(), pack(DOCUMENTS))["ce"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_is_done_at_the_embeddings_needs_no_gradient_of_theirs(own_base):
    model, batch = adapted(own_base).train(), pack(DOCUMENTS)
    objective = make_sft_objective(gradient_penalty=True, neftune_alpha=5.0)
    frozen = objective(model, batch)["gp"].item()
    sft_objective(model.requires_grad_(True), batch)
    assert frozen > 0 and frozen == pytest.approx(objective(model, batch)["gp"].item(), rel=0.5), "other noise"


def test_packed_documents_are_apart_with_adapters_too(own_base):
    model = adapted(own_base).double()
    together = logits_of(model, pack(DOCUMENTS)).split([len(document) - 1 for document in DOCUMENTS])
    for document, logits in zip(DOCUMENTS, together, strict=True):
        torch.testing.assert_close(logits, logits_of(model, pack([document])), rtol=0, atol=1e-12)
    touched = logits_of(model, pack([tokens(12, 9), *DOCUMENTS[1:]])).split([11, 1, 29])
    assert not torch.equal(touched[0], together[0])
    assert all(torch.equal(a, b) for a, b in zip(touched[1:], together[1:], strict=True))


def test_the_first_adapters_follow_from_the_seed_alone_in_whole_or_in_parts(own_base):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = dict(choose_model(request_of(own_base), 6400).named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = dict(choose_model(request_of(own_base), 6400).named_parameters())
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    matrix = whole["model.layers.1.mlp.down_proj.lora_A.default.weight"]
    assert matrix.abs().max() <= 48**-0.5 and matrix.std().item() == pytest.approx((3 * 48) ** -0.5, rel=0.2)
    other = dict(choose_model(ModelRequest(str(own_base), seed=1, lora=LORA), 6400).named_parameters())
    assert {name for name in whole if not torch.equal(whole[name], other[name])} == {n for n in whole if "lora_A" in n}

    skeleton, held = choose_model(request_of(own_base), 6400, empty=True), {}
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    names = {id(tensor): name for name, tensor in skeleton.named_parameters()}

    def second_half(tensor):
        first = -(-len(tensor) // 2)
        part = held.setdefault(names[id(tensor)], torch.empty(len(tensor) - first, *tensor.shape[1:]))
        return part, (first, *[0] * (tensor.dim() - 1))

    fill_model(skeleton, request_of(own_base), second_half, torch.float32)
    assert held.keys() == whole.keys()
    assert all(torch.equal(part, whole[name][-len(part) :]) for name, part in held.items() if len(part))


# --- which layers


def test_targets_are_ends_of_names(own_base):
    def layers(targets):
        model = choose_model(request_of(own_base, targets=targets), 6400)
        return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}

    prefixes = [f"model.layers.{layer}" for layer in range(2)]
    assert layers("q_proj, v_proj") == {f"{p}.self_attn.{kind}_proj" for p in prefixes for kind in "qv"}
    assert layers("layers.1.mlp.up_proj") == {"model.layers.1.mlp.up_proj"}
    assert len(layers("")) == 14, "all but the head"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "q_proj,wrong"}, r"--lora_targets wrong: no linear layer .* there are down_proj, gate_proj, k_pr"),
        ({"targets": "lm_head"}, "--lora_targets lm_head: no linear layer"),
        ({"targets": "embed_tokens"}, "--lora_targets embed_tokens: no linear layer"),
        ({"targets": "proj"}, "--lora_targets proj: no linear layer"),
        ({"rank": 33}, r"--lora_rank 33: .*model.layers.\*.self_attn.q_proj has 32"),
        ({"rank": 17, "targets": "q_proj,k_proj"}, r"--lora_rank 17: .*model.layers.\*.self_attn.k_proj has 16"),
    ],
)
def test_what_cannot_be_adapted_is_named(own_base, changes, message):
    with pytest.raises(ValueError, match=message):
        choose_model(request_of(own_base, **changes), 6400, empty=True)


def test_what_is_left_out_is_said(tmp_path, caplog):
    base = make_base(tmp_path / "base", **SHARED)
    with caplog.at_level("INFO", logger="train"):
        model = choose_model(request_of(base), 6400)
    assert "weights are trained" in caplog.text and "frozen and without adapters: " in caplog.text
    assert "model.layers.*.mlp.shared_expert_gate, model.layers.*.mlp.experts.gate_up_proj" in caplog.text
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".experts." in n or "mlp.gate" in n)


def test_a_layer_whose_weight_is_taken_past_it_gets_no_adapter(tmp_path, caplog):
    base = make_base(tmp_path / "base", "Mamba")
    model = choose_model(request_of(base), 6400)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and not any(".out_proj." in name or ".dt_proj." in name for name in names)
    assert "layers.*.mixer.out_proj" in caplog.text
    with pytest.raises(ValueError, match="--lora_targets out_proj: no linear layer of this model; there are .*in_proj"):
        choose_model(request_of(base, targets="out_proj"), 6400)


def test_flags_that_belong_together():
    with pytest.raises(ConfigError, match="--lora_rank 8 adapts a model .* --from_weight"):
        make_config({"lora_rank": 8})
    with pytest.raises(ConfigError, match="--lora_alpha needs --lora_rank\n--lora_targets needs --lora_rank"):
        make_config({"from_weight": "x", "lora_alpha": 8, "lora_targets": "q_proj"})
    with pytest.raises(ConfigError, match="--lora_rank 0: must be at least 1"):
        make_config({"from_weight": "x", "lora_rank": 0})
    wanted = make_config({"from_weight": "x", "lora_rank": 8}).model_request["lora"]
    assert wanted == {"rank": 8, "alpha": 16, "targets": "", "dropout": 0.0}
    assert Config().model_request["lora"] == {}


def test_peft_is_imported_where_adapters_are_wanted_and_nowhere_else():
    users = {path.name for path in FILES if path.parent.name != "tests" and "peft" in path.read_text()}
    assert "lora.py" in users
    for path in FILES:
        if path.parent.name != "tests":
            body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.FunctionDef)]
            assert not any(name.split(".")[0] == "peft" for node in body for name in imports_of(node)), path


def test_frozen_weights_need_no_room_for_gradients_and_moments(own_base):
    sizes = Sizes(**sizes_of(request_of(own_base), 6400))
    assert sizes.trained == sum(
        p.numel() for p in choose_model(request_of(own_base), 6400).parameters() if p.requires_grad
    )
    full = Sizes(**sizes_of(ModelRequest(str(own_base)), 6400))
    assert full.trained == full.parameters == sizes.parameters - sizes.trained
    config = Config()
    assert state_bytes(config, sizes.learnt) == 12 * sizes.trained
    certain = memory_need(config, sizes, 1, False).certain
    assert certain == 4 * full.parameters + 16 * sizes.trained < memory_need(config, full, 1, False).certain / 3


# --- what comes out

FAMILIES = [
    (None, {}), (None, SHARED), ("Gemma2", {"sliding_window": 8}), ("GPTNeoX", {}), ("Phi3", {"pad_token_id": 0}),
    ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda value: str(value)[:12])
def test_merged_or_apart_the_logits_are_those_that_were_trained(tmp_path, family, changes):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", family, **changes)
    before, plain = files_of(base), logits_of(load_model(base).eval(), pack(DOCUMENTS))
    model = adapted(base).eval()
    export_model(tmp_path / "final", model, TOKENIZER)
    assert files_of(base) == before
    # In float64 no rounding hides behind that of other kernels; grouped products of experts have none.
    dtype, tolerance = (torch.float64, 1e-5) if "num_experts_per_tok" not in changes else (torch.float32, 3e-5)
    together = logits_of(model.to(dtype), pack(DOCUMENTS))
    ours = together.split([len(document) - 1 for document in DOCUMENTS])
    assert (together - plain).abs().max() > 0.3
    network, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()), info
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "final" / "adapter")
    for document, expected in zip(DOCUMENTS, ours, strict=True):
        for theirs in (network.to(dtype).eval(), beside.to(dtype).eval()):
            with torch.no_grad():
                logits = theirs(input_ids=document[None, :-1]).logits[0]
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_what_is_merged_is_rounded_once(own_base, tmp_path):
    model = adapted(own_base)
    export_model(tmp_path / "final", model, TOKENIZER, dtype=torch.bfloat16)
    parts = dict(model.named_parameters())
    layer = "model.layers.1.self_attn.k_proj"
    a, b = (parts[f"{layer}.lora_{kind}.default.weight"].double() for kind in "AB")
    exact = parts[f"{layer}.base_layer.weight"].double() + 6 / 4 * b @ a
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert torch.equal(stored[f"{layer}.weight"], exact.bfloat16())
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    adapter = load_file(tmp_path / "final" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32} and len(adapter) == 28
    said = json.loads((tmp_path / "final" / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (RANK, 6, str(own_base))


def test_a_base_that_has_changed_in_the_meantime_is_not_merged(own_base, tmp_path):
    shutil.copytree(own_base, tmp_path / "base")
    model = adapted(tmp_path / "base")
    make_base(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="base are no longer those that the adapters were trained on"):
        export_model(tmp_path / "final", model, TOKENIZER)
    assert not (tmp_path / "final").exists()


# --- whole runs


class WatchBase:
    """Writes a digest of all frozen weights in memory before each training pass."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self, objective, rank):
        def watched(model, batch):
            import hashlib

            digest = hashlib.sha256()
            for parameter in (p for p in model.parameters() if not p.requires_grad):
                digest.update(parameter.detach().numpy().tobytes())
            if rank == 0:
                with self.file.open("a") as file:
                    file.write(f"{digest.hexdigest()}\n")
            return objective(model, batch)

        return watched


def test_a_run_leaves_its_base_alone_and_a_model_with_its_adapters(tmp_path, own_base, rows):
    before, run = files_of(own_base), tmp_path / "run"
    watch = tmp_path / "digests"
    flags = flags_of(own_base, rows, val_data_path=str(rows), save_top_k=1, ema_decay=0.9, eval_samples=2)
    assert train(1, run, wrap_objective=WatchBase(watch), **flags) == [0], log_of(run)
    steps = records_of(run, "train")
    digests = watch.read_text().splitlines()
    assert len(digests) > len(steps) and len(set(digests)) == 1, "the weights in memory, bit for bit"
    assert files_of(own_base) == before
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] and len(records_of(run, "eval")) == 2

    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    for kind, states in (("model", 1), ("ema", 1), ("optimizer", 3)):
        stored = load_file(checkpoint / f"{kind}-00001-of-00001.safetensors")
        assert len(stored) == 28 * states and all(".lora_" in name for name in stored), kind
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert size < (own_base / "model.safetensors").stat().st_size / 5

    assert {path.name for path in (run / "final" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (run / "best" / "adapter").is_dir()
    card = (run / "final" / "README.md").read_text()
    assert (
        f"fine-tuned from `{own_base}`" in card
        and "| LoRA | rank 4, alpha 8, all linear layers but the head, merged; " in card
    )
    model = choose_model(request_of(own_base, alpha=8), 6400).eval()
    model.load_state_dict(load_file(checkpoint / "model-00001-of-00001.safetensors"), strict=False)
    ours, theirs = (logits_of(each, pack(DOCUMENTS)) for each in (model, load_model(run / "final").eval()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - logits_of(load_model(own_base), pack(DOCUMENTS))).abs().max() > 1e-3

    assert checkpoints_script(["export", str(run)]) == 0
    assert files_of(run / f"export-{checkpoint.name}") == files_of(run / "final")
    assert evaluate([str(run), "--data_path", str(rows), "--limit", "2"]) == 0


def kill_and_resume(tmp_path, base, world_size, strategy, **more):
    rows = write_rows(tmp_path / "rows.jsonl", 48 * world_size)
    flags = flags_of(base, rows, strategy=strategy, accumulation_steps=3, batch_size=1, save_interval="2", max_steps=6)
    flags |= more
    assert train(world_size, tmp_path / "whole", **flags) == [0] * world_size, log_of(tmp_path / "whole")
    kill = KillAtCall(call=3 * 3 + 2, victim=world_size - 1)  # after step 3, in the first epoch
    codes = train(world_size, tmp_path / "cut", wrap_objective=kill, **flags)
    assert codes[world_size - 1] == -signal.SIGKILL
    assert train(world_size, tmp_path / "cut", from_resume="1", **flags) == [0] * world_size, log_of(tmp_path / "cut")
    assert "resumed from" in log_of(tmp_path / "cut") and records_of(tmp_path / "whole", "train")[3]["train/epoch"] < 1
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "whole")


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, own_base, world_size, strategy):
    kill_and_resume(tmp_path, own_base, world_size, strategy, gradient_checkpointing=world_size == 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (3, "ddp"), (3, "fsdp")])
def test_another_family_ends_with_the_same_bits(tmp_path, gemma, world_size, strategy, dtype):
    kill_and_resume(tmp_path, gemma, world_size, strategy, dtype=dtype)


def test_two_processes_learn_what_one_learns(tmp_path, gemma, rows):
    """Each with DDP and with FSDP2, whose weights are read shard by shard."""
    flags = flags_of(gemma, rows, lora_dropout=0.0, global_batch_size=4, max_steps=4, keep_last=2)
    stored, losses = [], []
    for name, world_size, strategy in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        run = tmp_path / name
        assert train(world_size, run, strategy=strategy, **flags) == [0] * world_size, log_of(run)
        stored.append(load_file(run / "final" / "model.safetensors"))
        losses.append([record["train/loss"] for record in records_of(run, "train")])
        norms = [record["train/grad_norm"] for record in records_of(run, "train")]
        losses[-1] += norms
    for other, numbers in zip(stored[1:], losses[1:], strict=True):
        assert numbers == pytest.approx(losses[0], rel=1e-5)
        assert other.keys() == stored[0].keys()
        for tensor, expected in zip(other.values(), stored[0].values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_optimizers_of_whole_matrices_train_adapters(tmp_path, own_base, rows, optimizer):
    run = tmp_path / "run"
    assert train(1, run, **flags_of(own_base, rows, optimizer=optimizer, max_steps=4)) == [0], log_of(run)
    losses = [record["train/loss"] for record in records_of(run, "train")]
    assert losses[-1] < losses[0]


def test_what_is_not_the_same_is_not_resumed(tmp_path, own_base, rows, capsys):
    shutil.copytree(own_base, base := tmp_path / "base")
    run, flags = tmp_path / "run", flags_of(base, rows, max_steps=2)
    assert train(1, run, **flags) == [0], log_of(run)
    shutil.rmtree(run / "final")
    assert train(1, run, from_resume="1", **{**flags, "lora_rank": 2}) == [2]
    assert "LoRA rank 4, alpha 8" in log_of(run) and "LoRA rank 2, alpha 4" in log_of(run)
    make_base(base, seed=1)
    assert train(1, run, from_resume="1", **flags) == [2]
    assert "the checkpoint has" in log_of(run) and log_of(run).count("of base weights ") == 2
    assert checkpoints_script(["export", str(run)]) == 2
    assert "are no longer those that the adapters were trained on" in capsys.readouterr().err
    shutil.rmtree(base)
    assert checkpoints_script(["export", str(run)]) == 2 and "there is no such directory" in capsys.readouterr().err
    assert checkpoints_script(["export", str(run), "--from_weight", str(own_base)]) == 0
    shutil.copytree(own_base, base)
    assert train(1, run, from_resume="1", **flags) == [0], log_of(run)


def test_a_base_in_bfloat16_is_merged_as_its_files_have_it(tmp_path, own_base, rows):
    run, flags = tmp_path / "run", flags_of(own_base, rows, max_steps=2, param_dtype="bfloat16", dtype="bfloat16")
    assert train(1, run, **flags) == [0], log_of(run)
    (file,) = (run / "checkpoints" / "step-00000002").glob("model-*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}, "adapters lose no small update"
    final, base = (load_file(directory / "model.safetensors") for directory in (run / "final", own_base))
    same = {name for name, tensor in base.items() if torch.equal(tensor, final[name])}
    assert "model.embed_tokens.weight" in same and not any("_proj" in name for name in same)
    assert train(1, run, from_resume="1", **flags) == [0] and "nothing to do" in log_of(run)


def test_a_rehearsal_saves_nothing(tmp_path, own_base, rows):
    run = tmp_path / "run"
    assert train(1, run, **flags_of(own_base, rows, dry_run=True)) == [0], log_of(run)
    assert "LoRA: 3,712 of" in log_of(run) and "Nothing was saved" in log_of(run)
    assert not run.exists() or not any(run.iterdir())
