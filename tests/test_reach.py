"""Text trains the text part of a model with several senses; what it does not reach is frozen, kept and said."""

import shutil

import pytest
import torch
from torch import nn

from model.build import ModelRequest, choose_model, known_positions, shape_of
from model.export import export_model
from model.generate import generate
from model.isolation import check_isolation
from model.loading import load_model, load_skeleton
from model.losses import sft_objective
from model.reach import freeze_unreached, outermost
from model.transformers_model import HFCausalLM
from tests.several_senses import FAMILIES, seeing
from tests.small_world import TINY, log_of, records_of, result_of, resume_from, train, write_rows
from tests.test_export import TOKENIZER
from tests.tiny_model import FILLER, foreign, logits_of, pack, tokens

DOCUMENTS = [tokens(12, 1), tokens(5, 2), tokens(30, 3)]


def weights_of(directory, family="Gemma3"):
    """By transformers' own class, under its names."""
    import transformers

    network, info = getattr(transformers, f"{family}ForConditionalGeneration").from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(info.values()), info
    return network.eval()


def test_text_that_is_read_both_ways_is_refused(tmp_path):
    seeing(tmp_path / "model", "PaliGemma")
    with pytest.raises(ValueError, match="no causal language model: its config.json says use_bidirectional_attention"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "PaliGemma"])
def test_text_reaches_the_text_part_alone(tmp_path, family):
    network = seeing(tmp_path / "model", family)
    whole, empty = load_model(tmp_path / "model"), load_skeleton(tmp_path / "model")
    assert whole.unreached == empty.unreached and list(whole.state_dict()) == list(network.state_dict())
    assert type(whole.inner) is type(network) and type(empty.inner) is type(network)
    assert known_positions(whole) == 128 and shape_of(whole, ["hidden_size"]) == {"hidden_size": 32}

    logits = logits_of(whole.train(), pack(DOCUMENTS)).split([len(document) - 1 for document in DOCUMENTS])
    for document, own in zip(DOCUMENTS, logits, strict=True):
        with torch.no_grad():
            alone = network(input_ids=document[None, :-1], use_cache=False).logits[0]
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-4)

    whole.requires_grad_(True)
    for batch in (pack(DOCUMENTS), FILLER):
        whole.zero_grad()
        sft_objective(whole, batch)["ce"].backward()
        without = [name for name, parameter in whole.named_parameters() if parameter.grad is None]
        assert without == whole.unreached and 0 < len(without) < len(list(whole.parameters()))
    assert all("vision" in name or "visual" in name or "projector" in name for name in without)
    frozen = sum(parameter.numel() for name, parameter in whole.named_parameters() if name in without)
    body, head = whole.parameter_counts()
    tied = whole.input_embeddings().weight is whole.inner.get_output_embeddings().weight
    assert body + head * (1 if tied else 2) + frozen == sum(parameter.numel() for parameter in whole.parameters())

    export_model(tmp_path / "final", whole, TOKENIZER)
    again = weights_of(tmp_path / "final", family).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "PaliGemma"])
def test_answers_in_a_batch_are_those_of_transformers(tmp_path, family):
    network = seeing(tmp_path, family)
    loaded, prompts = load_model(tmp_path), [tokens(length, length).tolist() for length in (5, 17, 1)]
    for prompt, answer in zip(prompts, generate(loaded, prompts, max_new_tokens=6, eos_token_ids=[]), strict=True):
        ids = list(prompt)
        for _ in answer:  # without a cache
            with torch.no_grad():
                ids.append(int(network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == answer and len(answer) == 6


def test_what_no_text_needs_is_frozen_in_any_family_but_experts_wait_for_their_tokens(tmp_path):
    foreign(tmp_path / "model", "Mistral")
    inner = HFCausalLM.from_pretrained(tmp_path / "model").inner
    inner.spare_head = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    inner.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    inner.model.layers[1].gain = nn.Parameter(torch.ones(3))
    model = HFCausalLM(inner)
    freeze_unreached(model, check_isolation(model))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == model.unreached and outermost(model, frozen) == ["model.layers.1.gain", "spare_head"]
    assert not load_model(tmp_path / "model").unreached and not load_skeleton(tmp_path / "model").unreached


def flags_of(base, rows, **changes):
    shape = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    return {
        **TINY, **shape, "data_path": str(rows), "from_weight": str(base), "tokenizer": str(TOKENIZER), "dropout": 0.0,
        "save_interval": "2", "max_steps": 4, "global_batch_size": 4, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("seeing") / "base"
    seeing(directory, vocab_size=6400)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


LORA = {"lora_rank": 2, "learning_rate": 0.2}
WAYS = {
    "alone": (1, {}), "ddp": (2, {}), "fsdp": (2, {"strategy": "fsdp"}), "muon": (2, {"optimizer": "muon"}),
    "ema": (2, {"ema_decay": 0.5}), "recomputed": (1, {"gradient_checkpointing": True}),
    "lora": (2, LORA), "lora fsdp": (2, {**LORA, "strategy": "fsdp"}),
    "lora named": (2, {**LORA, "lora_targets": "q_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_run_keeps_what_text_does_not_reach(tmp_path, base, rows, way):
    world_size, more = WAYS[way]
    flags = flags_of(base, rows, **more)
    assert train(world_size, tmp_path / "run", **flags) == [0] * world_size, log_of(tmp_path / "run")
    said = "parameters that text does not reach are frozen: model.vision_tower, model.multi_modal_projector"
    assert log_of(tmp_path / "run").count(said) == 1
    losses = [record["train/loss"] for record in records_of(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] or "lora_targets" in more  # a few adapters do little in four steps

    before, after = weights_of(base), weights_of(tmp_path / "run" / "final")
    unreached = set(load_skeleton(base).unreached)
    changed = {name for name, tensor in after.named_parameters() if not torch.equal(tensor, before.get_parameter(name))}
    trained = {name for name, _ in before.named_parameters()} - unreached
    if more.get("lora_rank"):
        kinds = ("q_proj.weight",) if "lora_targets" in more else ("_proj.weight",)
        trained = {name for name in trained if name.endswith(kinds)}
    assert changed == trained
    loaded = load_model(tmp_path / "run" / "final").eval()
    with torch.no_grad():
        theirs = after(input_ids=DOCUMENTS[0][None, :-1], use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(loaded, pack(DOCUMENTS[:1])), theirs, rtol=0, atol=1e-4)

    copy = resume_from(tmp_path / "run", 2, tmp_path / "again" / "run")
    shutil.copytree(tmp_path / "cache", tmp_path / "again" / "cache", dirs_exist_ok=True)
    assert train(world_size, copy, from_resume="1", **flags) == [0] * world_size, log_of(copy)
    assert "resumed from" in log_of(copy) and result_of(copy) == result_of(tmp_path / "run")


def test_two_processes_learn_what_one_learns(tmp_path, base, rows):
    losses = []
    for way in ("alone", "ddp", "fsdp"):
        world_size, more = WAYS[way]
        run = tmp_path / way
        assert train(world_size, run, **flags_of(base, rows, **more)) == [0] * world_size, log_of(run)
        losses.append([record["train/loss"] for record in records_of(run, "train")])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_adapters_are_laid_where_text_comes_by(base):
    lora = {"rank": 2, "alpha": 4, "targets": "", "dropout": 0.0}
    for empty in (False, True):
        model = choose_model(ModelRequest(str(base), lora=lora), 6400, empty=empty)
        adapted = [name for name, _ in model.named_parameters() if ".lora_A." in name]
        assert len(adapted) == 2 * 7 and all("language_model.layers" in name for name in adapted)
        assert not model.adapters.left_out


def test_a_larger_vocabulary_grows_beside_what_is_frozen(tmp_path):
    network = seeing(tmp_path / "model")
    for empty in (False, True):
        larger = choose_model(ModelRequest(from_weight=str(tmp_path / "model")), 103, empty=empty)
        assert larger.vocab_size == 103 and larger.added_entries == 6
    export_model(tmp_path / "final", choose_model(ModelRequest(from_weight=str(tmp_path / "model")), 103), TOKENIZER)
    again = weights_of(tmp_path / "final")
    assert again.config.text_config.vocab_size == 103
    assert torch.equal(again.get_input_embeddings().weight[:97], network.get_input_embeddings().weight)
