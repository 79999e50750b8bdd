"""Any causal language model trains: what cannot be packed is computed apart and said so, what is none is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.build import check_positions
from model.decoder import Decoder
from model.export import export_model
from model.generate import Sampling, generate
from model.isolation import check_isolation
from model.loading import load_model
from model.losses import make_sft_objective, sft_objective
from model.transformers_model import HFCausalLM
from scripts.bench.models import BEGIN, COLUMNS, END, FAMILIES, Cell, Trial, as_table, main, measure, with_table
from scripts.evaluate import main as evaluate
from scripts.verify.checks import write_rows
from tests.test_export import TOKENIZER
from tests.tiny_model import FILLER, check_recomputed, foreign, logits_of, pack, tokens

APART = {
    "Bloom": ({"n_head": 4, "n_layer": 2}, "one document changes the logits of another"),
    "Falcon": ({"head_dim": None}, "it takes no attention but its own"),
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "it fails"),
    "StableLm": ({}, "is not told the document boundaries"),
    "Mamba": ({"state_size": 4}, "it has layers of linear_attention, which know of no documents"),
    "Llama4Text": (
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "it has layers of chunked_attention",
    ),
}
DOCUMENTS = [tokens(12, 1), tokens(2, 2), tokens(30, 3), tokens(9, 4)]
LENGTHS = [11, 1, 29, 8]


@pytest.mark.parametrize("name", APART)
def test_what_cannot_be_packed_is_computed_apart_and_said_so(tmp_path, name, caplog):
    changes, reason = APART[name]
    network = foreign(tmp_path / "model", name, **changes)
    with caplog.at_level("WARNING", logger="train"):
        loaded = load_model(tmp_path / "model")
    assert f"{type(network).__name__} cannot be packed: " in caplog.text and reason in caplog.text
    assert list(loaded.state_dict()) == list(network.state_dict()) and len(loaded.shard_units()) == 2

    packed = logits_of(loaded.train(), pack(DOCUMENTS)).split(LENGTHS)
    for document, logits in zip(DOCUMENTS, packed, strict=True):
        with torch.no_grad():
            alone = network.eval()(input_ids=document[None, :-1], use_cache=False).logits[0]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)
    touched = logits_of(loaded, pack([tokens(12, 9), *DOCUMENTS[1:]])).split(LENGTHS)
    differences = [(a - b).abs().max().item() for a, b in zip(packed, touched, strict=True)]
    assert differences[0] > 0.1 and max(differences[1:]) <= 1e-5

    sft_objective(loaded, FILLER)["ce"].backward()  # DDP and FSDP wait for every parameter
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in loaded.parameters())


def test_the_supervised_positions_are_those_of_the_batch(tmp_path):
    """The longest document comes first and in another call than the others; the positions have their own order."""
    foreign(tmp_path / "model", "Mamba", state_size=4)
    loaded = load_model(tmp_path / "model").eval()
    everything = logits_of(loaded, pack(DOCUMENTS))
    some = pack(DOCUMENTS, supervise=lambda position: position % 3 == 1)
    assert torch.equal(logits_of(loaded, some), everything[some["supervised_positions"]])
    assert len(some["targets"]) not in (0, len(everything))


def test_noise_and_recomputation_work_apart_too(tmp_path):
    foreign(tmp_path / "model", "StableLm")
    loaded, batch = load_model(tmp_path / "model").train(), pack(DOCUMENTS)
    sft_objective(loaded, batch)["ce"].backward()
    plain = [parameter.grad.clone() for parameter in loaded.parameters()]
    noisy = make_sft_objective(neftune_alpha=5.0)
    torch.manual_seed(0)
    assert (noisy(loaded, batch)["ce"] - sft_objective(loaded, batch)["ce"]).abs() > 0.01
    check_recomputed(loaded, batch, plain)


def test_a_window_that_our_attention_is_not_told_of_is_noticed(tmp_path, monkeypatch):
    """The trial is shorter than any real window, so it cannot show in the logits."""
    foreign(tmp_path / "model", "Mistral", sliding_window=4000)
    told = load_model(tmp_path / "model")
    assert told.reading == "packed"
    monkeypatch.setattr(told.config, "layer_types", ["full_attention", "sliding_attention"], raising=False)
    check_isolation(told)
    assert told.reading == "apart"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Bert", {}, "BertLMHeadModel is no causal language model .* a token changes the logits of those before it"),
        ("T5", {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}, "no causal language model .*T5Config"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(tmp_path, name, changes, message):
    import transformers

    if name == "T5":
        config = transformers.T5Config(vocab_size=97, **changes)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    else:
        foreign(tmp_path / "model", name, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["Gemma2", "Mamba", "Falcon"])
def test_answers_in_a_batch_are_those_one_by_one_and_those_of_transformers(tmp_path, name):
    changes = {"Gemma2": {"sliding_window": 6}, "Mamba": {"state_size": 4}, "Falcon": {"head_dim": None}}[name]
    network = foreign(tmp_path / "model", name, **changes)
    loaded = load_model(tmp_path / "model")
    prompts = [tokens(length, length).tolist() for length in (5, 17, 1, 9)]
    wanted = {"max_new_tokens": 10, "eos_token_ids": []}
    together = generate(loaded, prompts, **wanted)
    assert [generate(loaded, [prompt], **wanted)[0] for prompt in prompts] == together
    assert len({tuple(answer) for answer in together}) == len(prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in answer:  # without a cache
            with torch.no_grad():
                ids.append(int(network.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == answer
    ends = {together[0][3], together[1][6]}
    cut = [answer[: next((i for i, t in enumerate(answer) if t in ends), 10)] for answer in together]
    assert generate(loaded, prompts, max_new_tokens=10, eos_token_ids=ends) == cut
    hot = Sampling(temperature=2.0, seed=3)
    first, alone = (generate(loaded, some, **wanted, sampling=hot)[0] for some in (prompts, prompts[:1]))
    assert first == alone != together[0]


def test_a_family_without_a_bound_on_positions_is_evaluated(tmp_path):
    foreign(tmp_path / "model", "Mamba", state_size=4, vocab_size=6400)
    export_model(tmp_path / "final", load_model(tmp_path / "model"), TOKENIZER)
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    flags = ["--data_path", str(rows), "--max_new_tokens", "4", "--cache_dir", str(tmp_path / "cache")]
    assert evaluate([str(tmp_path / "final"), *flags]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["samples"] == 3


# --- the table


CHEAP = {  # each a part of the columns; the whole table is in the long lane
    "SmolLM3": ("rows", "isolated", "influence", "as transformers", "DDP", "FSDP2"),
    "GPT-OSS": ("rows", "isolated", "influence", "as transformers", "resume", "export", "answers"),
    "Mamba": ("rows", "isolated", "influence", "as transformers", "FSDP2", "answers"),
}


def words_in(cells):
    """The columns that hold no number."""
    return {column for column, cell in cells.items() if isinstance(cell.value, str)}


@pytest.mark.parametrize("name", CHEAP)
def test_families_are_trained_as_the_table_says(tmp_path, name):
    cells = measure(name, tmp_path / "work", write_rows(tmp_path / "rows.jsonl", 6), CHEAP[name])
    assert tuple(cells) == CHEAP[name] and not {column: str(cell) for column, cell in cells.items() if cell.fails}
    assert cells["rows"].value == ("side by side" if name == "Mamba" else "packed")
    assert words_in(cells) == {"rows", "answers"} & cells.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_cell_of_the_table_holds(tmp_path, name):
    cells = measure(name, tmp_path / "work", write_rows(tmp_path / "rows.jsonl", 12))
    assert list(cells) == list(COLUMNS) and not {column: str(cell) for column, cell in cells.items() if cell.fails}
    assert words_in(cells) == {"rows", "answers"}


def test_a_family_that_leaks_fails_its_cell(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    trial = Trial(FAMILIES["BLOOM"], tmp_path / "work", tmp_path / "rows.jsonl")
    trial.save_model()
    assert not trial.influence().fails
    monkeypatch.setattr("model.loading.check_isolation", lambda *how: None)
    assert trial.influence().fails and trial.isolated().fails


def test_a_cell_shows_what_fails():
    assert [str(cell) for cell in (Cell(0.0), Cell(2e-15, 1e-12), Cell("packed"))] == ["0", "2e-15", "packed"]
    assert [str(cell) for cell in (Cell(0.5, 0.1), Cell("", error="no"), Cell(float("nan"), 1.0))] == [
        "**5e-01**", "**no**", "**nan**",
    ]  # fmt: skip
    table = as_table({"Llama": dict.fromkeys(COLUMNS, Cell(0.0))})
    assert "| Llama | " + " | ".join("0" * len(COLUMNS)) + " |" in table
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    assert main(["--families", "Lama"]) == 2


def test_the_page_has_a_row_for_every_family():
    page = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in page[page.index(BEGIN) :].splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].split("(")[0].strip() for row in rows[1:]] == list(FAMILIES)
    assert all(f" {column} |" in rows[0] for column in COLUMNS)
    numbers = rf"( (0|[0-9]e-[0-9]{{2}}) \|){{{len(COLUMNS) - 2}}}"
    measured = re.compile(rf"\| [^|]+ \| (packed|side by side) \|{numbers} 3/3 \|")
    assert [row for row in rows[1:] if not measured.fullmatch(row)] == []


@pytest.mark.parametrize(
    ("name", "tied"), [("Llama", False), ("Llama", True), ("Mistral", False), ("Gemma3Text", True)]
)
def test_many_files_in_half_precision_are_read_as_one_in_float32(tmp_path, name, tied):
    network = foreign(tmp_path / "model", name, tie_word_embeddings=tied).bfloat16()
    (tmp_path / "model" / "model.safetensors").unlink()
    network.save_pretrained(tmp_path / "model", max_shard_size="16KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    loaded, stored = load_model(tmp_path / "model"), network.state_dict()
    assert isinstance(loaded, Decoder if name == "Llama" else HFCausalLM)
    assert loaded.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key].float()) for key, tensor in loaded.state_dict().items())
    embedding, head = loaded.vocabulary_modules()
    assert (embedding.weight is head.weight) == tied and embedding.weight.dtype == torch.float32


MEMORY = """
import sys, threading, time
import torch, transformers, accelerate
from model.loading import load_model

def resident():  # without the pages of files, which the system takes back when it likes
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

before, most, done = resident(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        most[0] = max(most[0], resident())
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1])
done.set()
thread.join()
print((most[0] - before) / sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_there_are_never_two_copies_of_the_weights(tmp_path, name):
    """434 MB of float32 from float16 files of 100 MB: the decoder's own way of reading and that of transformers."""
    import transformers

    shape = {"vocab_size": 20000, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 11}
    config = getattr(transformers, f"{name}Config")(**shape, num_attention_heads=12, num_key_value_heads=6)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    network.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "model")],
        cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert 0.9 < float(ran.stdout.split()[-1]) < 1.3
    loaded, stored = load_model(tmp_path / "model"), network.state_dict()
    assert isinstance(loaded, Decoder if name == "Llama" else HFCausalLM)
    assert all(torch.equal(tensor, stored[key].float()) for key, tensor in loaded.state_dict().items())


# --- angles that follow the longest document of a batch


@pytest.mark.parametrize(
    ("family", "known", "rope"),
    [
        ("Phi3", 2048, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                        "original_max_position_embeddings": 64}),
        ("Llama", 64, {"rope_type": "dynamic", "factor": 8.0}),
    ],
)  # fmt: skip
def test_a_document_that_would_stretch_its_neighbours_is_refused(tmp_path, family, known, rope):
    own = rope.get("original_max_position_embeddings")
    more = {"original_max_position_embeddings": own, "head_dim": None} if own else {}
    foreign(tmp_path, family, max_position_embeddings=known, rope_parameters={**rope, "rope_theta": 1e4}, **more)
    model = load_model(tmp_path)
    with torch.no_grad():
        alone, fits, too_long = (
            logits_of(model, pack([*others, tokens(30, 1)]))[-29:] for others in ([], [tokens(65, 2)], [tokens(66, 2)])
        )
    torch.testing.assert_close(fits, alone, rtol=0, atol=1e-5)
    assert (too_long - alone).abs().max() > 0.01, "64 tokens are read of 65, the last of which is only a target"
    check_positions(model, np.array([30, 65]), 2048)
    with pytest.raises(ValueError, match="a sample has 65 tokens, .*; give --max_seq_len 64 and say with --overlong"):
        check_positions(model, np.array([30, 66]), 2048)
