"""A tokenizer with more entries than the model: the new rows are the mean of the old ones, wherever they are held."""

import json
import shutil

import pytest
import torch

from dataset.prepare import DataOptions, prepare
from dataset.tokenizer import vocabulary_size
from model.build import ModelRequest, choose_model, fill_model, load_tokenizer
from model.decoder import Decoder
from model.export import export_model
from model.loading import load_model
from model.partial_weights import whole
from model.vocabulary import grow, mean_row
from scripts.chat import main as chat
from scripts.checkpoints import main as checkpoints
from tests.small_world import TINY, log_of, result_of, resume_from, train, write_rows
from tests.test_export import TOKENIZER
from tests.tiny_model import foreign, logits_of, pack, tiny, tokens

MODELS = {
    "tied decoder": lambda path: export_model(path, tiny(), TOKENIZER),
    "decoder": lambda path: export_model(path, tiny(tie_word_embeddings=False), TOKENIZER),
    "Mistral": lambda path: foreign(path, "Mistral"),
    "Gemma3Text": lambda path: foreign(path, "Gemma3Text"),  # tied, and its embeddings are a class of their own
    "Phi": lambda path: foreign(path, "Phi", num_key_value_heads=4),  # its head has a bias
    "Mamba": lambda path: foreign(path, "Mamba", state_size=4),
}
UNTIED = ("decoder", "Mistral", "Phi")


@pytest.mark.parametrize("kind", MODELS)
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, kind, caplog):
    from transformers import AutoModelForCausalLM

    MODELS[kind](tmp_path / "model")
    request = ModelRequest(from_weight=str(tmp_path / "model"))
    plain = choose_model(request, 97)
    assert "are added" not in caplog.text and plain.added_entries == 0
    larger = choose_model(request, 103)
    assert "has 103 entries, the vocabulary of" in caplog.text and "6 are added" in caplog.text
    assert larger.vocab_size == larger.config.vocab_size == 103
    before, after = plain.state_dict(), larger.state_dict()
    assert list(before) == list(after) and len(larger.vocabulary_modules()) == 2
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        if len(after[name]) > len(tensor):
            mean = tensor.double().mean(0)
            torch.testing.assert_close(after[name][97:], mean.expand(6, *mean.shape).float(), rtol=0, atol=1e-6)
    assert (larger.lm_head.weight is larger.input_embeddings().weight) == (kind not in UNTIED)

    document = tokens(20)
    logits = [logits_of(model.eval(), pack([document])) for model in (plain, larger)]
    assert torch.equal(logits[0], logits[1][:, :97]) or (logits[0] - logits[1][:, :97]).abs().max() < 1e-5

    shared = choose_model(request, 103, empty=True)
    shared._apply(lambda tensor: torch.empty_like(tensor, device="cpu").fill_(9) if tensor.is_meta else tensor)
    if kind not in UNTIED:
        shared.lm_head.weight = shared.input_embeddings().weight
    fill_model(shared, request, whole, torch.float32)
    assert all(torch.equal(tensor, after[name]) for name, tensor in shared.state_dict().items())

    export_model(tmp_path / "final", larger, TOKENIZER)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["vocab_size"] == 103
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(theirs.get_input_embeddings().weight, larger.input_embeddings().weight)
    assert choose_model(ModelRequest(from_weight=str(tmp_path / "final")), 103).added_entries == 0


def test_a_process_may_hold_any_part_of_a_larger_table(tmp_path):
    """The first rows, old and new ones, new ones alone, none."""
    MODELS["decoder"](tmp_path / "model")
    request = ModelRequest(from_weight=str(tmp_path / "model"))
    expected = choose_model(request, 103).state_dict()
    for first, end in ((0, 50), (90, 99), (98, 103), (103, 103)):
        model, held = choose_model(request, 103, empty=True), {}

        def part_of(tensor, held=held, first=first, end=end):
            low, high = min(first, len(tensor)), min(end, len(tensor))
            part = torch.full((high - low, *tensor.shape[1:]), torch.nan)
            return held.setdefault(id(tensor), part), (low, *[0] * (tensor.dim() - 1))

        fill_model(model, request, part_of, torch.float32)
        for name, parameter in model.named_parameters():
            assert torch.equal(held[id(parameter)], expected[name][first:end]), name


def test_the_mean_is_that_of_all_rows_and_does_not_grow_with_them():
    table = torch.full((10_000, 3), 0.1)
    assert torch.equal(mean_row(table, 10_000), torch.full((3,), 0.1))
    model = tiny()
    grow(model, 90)
    assert isinstance(model, Decoder) and model.vocab_size == 97


def test_a_run_with_new_tokens_resumes_exactly_whole_and_shared(tmp_path):
    from transformers import AutoTokenizer

    foreign(tmp_path / "model", "Mistral", vocab_size=6400, max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<|new|>", "<|newer|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = {
        "data_path": str(write_rows(tmp_path / "rows.jsonl", 8)), "from_weight": str(tmp_path / "model"), "epochs": 1,
        "tokenizer": str(tmp_path / "tokenizer"), "dropout": 0, "save_interval": "2", "batch_size": 2,
        **{name: None for name in TINY if name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "intermediate_size": None,
    }  # fmt: skip
    for strategy in ("ddp", "fsdp"):
        assert train(2, tmp_path / strategy, strategy=strategy, **flags) == [0, 0]
    copy = resume_from(tmp_path / "fsdp", 2, tmp_path / "again" / "fsdp")
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "again")
    assert train(2, copy, strategy="fsdp", from_resume="1", **flags) == [0, 0]
    assert result_of(copy) == result_of(tmp_path / "fsdp")
    config = json.loads((copy / "final" / "config.json").read_text())
    assert config["vocab_size"] == 6402
    losses = [
        [r["train/loss"] for r in result_of(tmp_path / s)["records"] if "train/loss" in r] for s in ("ddp", "fsdp")
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_with_holes_in_its_ids_is_trained_exported_and_read_again(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    holed = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, holed)
    parts = json.loads((holed / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = parts["model"]["vocab"]
    parts["model"]["vocab"] = {token: number + 70_000 * (number >= 300) for token, number in vocabulary.items()}
    (holed / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    tokenizer = load_tokenizer(str(holed))
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (6400, 76_400)
    assert vocabulary_size(load_tokenizer(str(TOKENIZER))) == 6400
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    ids, _ = prepare(rows, tokenizer, DataOptions(), tmp_path / "cache", echo=lambda _: None).tokens(0)
    assert ids.max() >= 70_300 and "user\nSay" in tokenizer.decode(ids)

    run, flags = tmp_path / "run", {"data_path": str(rows), "max_steps": 1}
    assert train(1, run, **flags, tokenizer=str(holed)) == [0], log_of(run)
    again, model = AutoTokenizer.from_pretrained(run / "final"), AutoModelForCausalLM.from_pretrained(run / "final")
    assert again.get_vocab() == tokenizer.get_vocab() and model.config.vocab_size == 76_400
    assert checkpoints(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert chat([str(run), "--prompt", "Say 1", "--max_new_tokens", "2", "--device", "cpu"]) == 0

    foreign(tmp_path / "model", "Mistral", vocab_size=6400, max_position_embeddings=128)  # enough for as many entries
    shape = {name: None for name in TINY if name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    flags |= {**shape, "intermediate_size": None, "dropout": 0, "from_weight": str(tmp_path / "model")}
    assert train(1, tmp_path / "grown", **flags, tokenizer=str(holed)) == [0], log_of(tmp_path / "grown")
    assert json.loads((tmp_path / "grown" / "final" / "config.json").read_text())["vocab_size"] == 76_400


def far_tokenizer(directory, number):
    """Our tokenizer with one more token far behind the others."""
    shutil.copytree(TOKENIZER, directory)
    parts = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    parts["model"]["vocab"]["<|far|>"] = number
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": number, "content": "<|far|>"})
    (directory / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    return load_tokenizer(str(directory))


LORA = {"rank": 2, "alpha": 4, "targets": "", "dropout": 0.0}


@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["tied decoder", "decoder", "Mistral", "Gemma3Text"])
def test_a_smaller_tokenizer_leaves_the_padding_of_a_vocabulary_alone(tmp_path, kind, lora, caplog):
    """As in Qwen's checkpoints, whose vocabulary is rounded up."""
    MODELS[kind](tmp_path / "model")
    request = ModelRequest(from_weight=str(tmp_path / "model"), lora=lora)
    for empty in (False, True):
        model = choose_model(request, 90, empty=empty)
        assert model.vocab_size == 97 and model.added_entries == 0 and "are added" not in caplog.text
    export_model(tmp_path / "final", choose_model(request, 90), TOKENIZER)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["vocab_size"] == 97
    again, before = (load_model(tmp_path / name).state_dict() for name in ("final", "model"))
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"lora_rank": 2, "strategy": "fsdp"}], ids=str)
@pytest.mark.parametrize("kind", ["decoder", "Mistral"])
def test_a_token_far_behind_the_others_makes_room_up_to_its_id(tmp_path, kind, more):
    from transformers import AutoModelForCausalLM

    tokenizer = far_tokenizer(tmp_path / "tokenizer", 6500)
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (6401, 6501)
    if kind == "decoder":
        export_model(tmp_path / "model", tiny(vocab_size=6450, tie_word_embeddings=False), TOKENIZER)
    else:
        foreign(tmp_path / "model", kind, vocab_size=6450)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "<|far|>"}]
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    flags = {name: None for name in TINY if name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    flags |= {"data_path": str(rows), "from_weight": str(tmp_path / "model"), "tokenizer": str(tmp_path / "tokenizer")}
    flags |= {"intermediate_size": None, "dropout": 0.0, "max_steps": 1, **more}
    processes = 2 if "strategy" in more else 1
    assert train(processes, tmp_path / "run", **flags) == [0] * processes, log_of(tmp_path / "run")
    assert "has 6501 entries" in log_of(tmp_path / "run") and "51 are added" in log_of(tmp_path / "run")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert len(final.get_input_embeddings().weight) == len(final.lm_head.weight) == final.config.vocab_size == 6501
    if more:
        old = load_model(tmp_path / "model").input_embeddings().weight
        mean = old.double().mean(0).float().expand(51, -1)
        assert torch.equal(final.get_input_embeddings().weight[:6450], old)
        torch.testing.assert_close(final.get_input_embeddings().weight[6450:], mean, rtol=0, atol=1e-6)
    assert chat([str(tmp_path / "run"), "--prompt", "1?", "--max_new_tokens", "2", "--device", "cpu"]) == 0
