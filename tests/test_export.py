"""What is exported opens in transformers as it is, and what is loaded is what was meant or refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.export
from model.decoder import Decoder
from model.export import export_model
from model.loading import load_model
from model.losses import sft_objective
from model.transformers_model import HFCausalLM
from tests.tiny_model import FILLER, check_recomputed, foreign, logits_of, pack, tiny, tokens

TOKENIZER = Path(__file__).resolve().parent.parent / "model" / "tokenizer"
FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def final(tmp_path):
    export_model(tmp_path / "final", tiny(), TOKENIZER, card="# A model\n")
    return tmp_path / "final"


# --- export


def test_the_directory_holds_exactly_these_files(final):
    assert {path.name for path in final.iterdir()} == FILES
    assert {path.name for path in final.parent.iterdir()} == {"final"}
    assert (final / "README.md").read_text() == "# A model\n"
    assert (final / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_it_and_computes_the_same(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder = tiny(tie_word_embeddings=tied, rope_theta=123.0)
    export_model(tmp_path / "final", decoder, TOKENIZER)
    llama, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()), info
    assert type(llama).__name__ == "LlamaForCausalLM" and llama.dtype == torch.float32
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    document = tokens(20)
    with torch.no_grad():
        theirs = llama(input_ids=document[None, :-1]).logits[0]
    torch.testing.assert_close(logits_of(decoder, pack([document])), theirs, rtol=0, atol=1e-5)
    assert llama.generation_config.eos_token_id == 2 and llama.generation_config.pad_token_id == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in prompt
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


def test_the_configuration_serves_older_readers_too(final):
    config = read(final / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["rope_theta"] == 10000.0 and config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 2, 0)
    assert "dropout" not in config
    assert read(final / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_loaded_tokenizer_can_be_exported_instead_of_its_directory(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    export_model(tmp_path / "final", tiny(), tokenizer)
    assert {path.name for path in (tmp_path / "final").iterdir()} >= FILES
    assert read(tmp_path / "final" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again("Größe 12 <think>").input_ids == tokenizer("Größe 12 <think>").input_ids
    assert again.chat_template == tokenizer.chat_template


def test_a_tied_head_is_saved_once_and_half_precision_is_real(tmp_path):
    decoder = tiny()
    export_model(tmp_path / "final", decoder, TOKENIZER, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert stored.keys() == dict(decoder.named_parameters()).keys() and "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert read(tmp_path / "final" / "config.json")["dtype"] == "bfloat16"


def test_other_weights_can_be_exported_in_place_of_the_models(tmp_path):
    average = {name: tensor + 1 for name, tensor in tiny().state_dict().items()}
    export_model(tmp_path / "final", tiny(), TOKENIZER, state_dict=average)
    assert all(
        torch.equal(tensor, average[name]) for name, tensor in load_model(tmp_path / "final").state_dict().items()
    )


def test_a_new_export_replaces_the_old_one_whole(final):
    (final / "stale.txt").write_text("")
    export_model(final, tiny(seed=1), TOKENIZER)
    assert {path.name for path in final.iterdir()} == FILES
    assert {path.name for path in final.parent.iterdir()} == {"final"}
    assert all(
        torch.equal(a, b) for a, b in zip(load_model(final).parameters(), tiny(seed=1).parameters(), strict=True)
    )


def test_a_failed_export_leaves_the_old_one_alone(final, monkeypatch):
    before = {path.name: path.read_bytes() for path in final.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.export, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_model(final, tiny(seed=1), TOKENIZER)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert {path.name for path in final.parent.iterdir()} == {"final"}


def test_a_failed_rename_puts_the_old_one_back(final, monkeypatch):
    before, rename = (final / "model.safetensors").read_bytes(), Path.rename

    def fails_for_the_draft(self, target):
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_draft)
    with pytest.raises(OSError, match="Input/output"):
        export_model(final, tiny(seed=1), TOKENIZER)
    assert (final / "model.safetensors").read_bytes() == before
    assert {path.name for path in final.parent.iterdir()} == {"final"}


def test_every_file_is_on_the_disk_before_the_directory_has_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append(Path(target).name), rename(self, target)))
    export_model(tmp_path / "final", tiny(), TOKENIZER)
    published = events.index("final")
    assert {Path(event).name for event in events[: published - 1]} == FILES
    assert events[published + 1 :] == [str(tmp_path)]


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json"):
        export_model(tmp_path / "final", tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- loading what we exported


def test_our_export_comes_back_bit_for_bit(final):
    loaded = load_model(final, dropout=0.25)
    assert isinstance(loaded, Decoder) and loaded.config.dropout == 0.25
    assert {**vars(loaded.config), "dropout": 0.0} == {**vars(tiny().config)}
    for name, tensor in tiny().state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_weights_that_do_not_fit_are_all_named(final):
    stored = load_file(final / "model.safetensors")
    stored["model.norm.bias"] = stored.pop("model.norm.weight")
    stored["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(stored, final / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(final)
    for part in (
        "model.norm.bias is not part of it", "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is (48, 31) and should be (48, 32)",
    ):  # fmt: skip
        assert part in str(error.value)
    (final / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_model(final)


# --- any other model of transformers


FAMILIES = [
    ("Llama", {"attention_bias": True}),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}),
    ("Mistral", {"tie_word_embeddings": True}),
    ("Mistral", {"sliding_window": 4}),
    ("Gemma2", {"sliding_window": 4}),
    ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_other_families_keep_documents_apart_and_their_own_names(tmp_path, family, changes):
    network = foreign(tmp_path / "model", family, **changes)
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, HFCausalLM)
    assert list(loaded.state_dict()) == list(network.state_dict())
    assert len(loaded.shard_units()) == 2
    body, head = loaded.parameter_counts()
    assert head == 97 * 32 and body > 0

    documents = [tokens(12, 1), tokens(2, 2), tokens(30, 3)]
    packed = logits_of(loaded.train(), pack(documents)).split([11, 1, 29])
    for document, logits in zip(documents, packed, strict=True):
        with torch.no_grad():
            alone = network.eval()(input_ids=document[None, :-1], use_cache=False).logits[0]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)
    touched = logits_of(loaded, pack([tokens(12, 9), *documents[1:]])).split([11, 1, 29])
    # The experts of a mixture multiply as many rows as they are sent, and rounding depends on that number.
    tolerance = 1e-5 if family == "Mixtral" else 0.0
    differences = [(a - b).abs().max().item() for a, b in zip(packed, touched, strict=True)]
    assert differences[0] > 0.1 and max(differences[1:]) <= tolerance


def test_every_parameter_of_another_family_is_trained_and_a_filler_trains_none(tmp_path):
    foreign(tmp_path / "model", "Mistral")
    loaded = load_model(tmp_path / "model").train()
    sft_objective(loaded, FILLER)["ce"].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in loaded.parameters())
    batch = pack([tokens(12, 1), tokens(8, 2)])
    sft_objective(loaded, batch)["ce"].backward()
    plain = [p.grad.clone() for p in loaded.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in plain)
    check_recomputed(loaded, batch, plain)


def test_another_family_of_experts_is_balanced_too(tmp_path, caplog):
    """The logits come from hooks, which a layer that is computed again must not fill twice."""
    shape = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
    foreign(tmp_path / "model", "Qwen3Moe", **shape)
    ours = load_model(tmp_path / "model")
    theirs = HFCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(ours, Decoder) and ours.term_weights == theirs.term_weights == {"aux": 0.01, "router_z": 0.0}
    theirs.enable_gradient_checkpointing()
    batch, gradients = pack([tokens(12, 1), tokens(30, 2)]), []
    for network in (ours, theirs):
        sums = sft_objective(network.train(), batch)
        (sums["aux"] + sums["router_z"]).backward()
        routers = [p.grad for name, p in network.named_parameters() if name.endswith("mlp.gate.weight")]
        gradients.append([sums["aux"], sums["router_z"], sums["max_expert_share"], *routers])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(gradients[0]) == 5 and not caplog.text


def test_a_family_that_balances_otherwise_is_told_of(tmp_path, caplog):
    shape = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
    shape |= {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
    foreign(tmp_path / "model", "Glm4Moe", **shape)
    with caplog.at_level("WARNING", logger="train"):
        network = HFCausalLM.from_pretrained(tmp_path / "model")
    assert "Glm4MoeForCausalLM: the balance of its experts is not trained" in caplog.text
    assert network.term_weights == {}


def test_weights_that_transformers_would_make_up_are_refused(tmp_path):
    foreign(tmp_path / "model", "Mistral")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "model")


def test_a_place_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"[Mm]odel in {tmp_path}"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=f"no model in {tmp_path}/nowhere: there is no such directory"):
        load_model(tmp_path / "nowhere")


def test_another_family_is_exported_for_old_and_new_readers(tmp_path):
    from transformers import AutoModelForCausalLM

    foreign(tmp_path / "model", "Mistral", rope_parameters={"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0})
    loaded = load_model(tmp_path / "model")
    export_model(tmp_path / "final", loaded, TOKENIZER, dtype=torch.bfloat16)
    config = read(tmp_path / "final" / "config.json")
    assert config["rope_theta"] == 77.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16())
    assert again.config.rope_parameters == {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0}


def test_a_weight_beyond_float16_is_named_instead_of_written_as_infinity(tmp_path):
    model = tiny(vocab_size=6400)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="float16 ends at 65,504, and .*down_proj.weight has 100,000: --export_dtype"):
        export_model(tmp_path / "final", model, TOKENIZER, dtype=torch.float16)
    assert not (tmp_path / "final").exists()
    export_model(tmp_path / "final", model, TOKENIZER, dtype=torch.bfloat16)
