"""With an exported file llama.cpp computes what the decoder does, cuts text as its tokenizer does, and answers so."""

import json
import shutil

import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dataset.demo import held_out_conversations
from model.build import OWN_TOKENIZER, load_tokenizer
from scripts import gguf as gguf_file
from scripts.bench.gguf import ODD_TEXTS, LlamaCpp
from scripts.bench.gguf import main as compare
from scripts.export import DTYPES, main
from scripts.gguf import PRE_TOKENIZERS, adds_bos, write_gguf
from tests.small_world import export_learnt
from tests.test_families import SHAPES, SHARED, lively
from tests.tiny_model import foreign, logits_of, pack, tokens

VOCABULARY = 6400
REFUSED = {
    "yarn2": "rounds the ramp of yarn",
    "qwen3_moe plain sum": "lets the weights of a token's experts add up to 1 in Qwen3Moe",
    "qwen3_moe llama3": "no llama3 positions in Qwen3Moe",
    "qwen2_moe": "does not let the weights of a token's experts add up to 1 in Qwen2Moe",
}
WRITTEN = {name: changes for name, (_, changes) in SHAPES.items() if name not in REFUSED}
WRITTEN |= {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False, "head_dim": 12, "rope_theta": 123.0},
    "qwen2_moe plain": {**SHARED, "norm_topk_prob": False, "tie_word_embeddings": False},
}


TEXTS = [*ODD_TEXTS, *(message["content"] for row in held_out_conversations() for message in row["messages"])]
WORDS = {name: steps[0].removeprefix("Split ") for name, (steps, _) in PRE_TOKENIZERS.items()}
CUTS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [
        pre_tokenizers.Split(Regex(WORDS["qwen2"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(WORDS["llama-bpe"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def trained_tokenizer(cuts, whole_words: bool = False, bos: bool = False):
    """A byte-level BPE of another family, trained on the demo."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>" if bos else None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(OWN_TOKENIZER))


@pytest.fixture(scope="module")
def small_tokenizer():
    """Readers in Python take seconds for thousands of tokens."""
    return trained_tokenizer(CUTS["qwen2"])


def difference(model, path, tokenizer) -> float:
    """The largest one between our logarithm of a probability and that of llama.cpp, among its 500 likeliest tokens.

    After a document of 119 tokens that is followed by whole characters: after half a one llama.cpp tells no numbers.
    """
    for seed in range(99):
        document = tokens(120, seed, 700)
        with torch.no_grad():
            ours = logits_of(model, pack([document]))[-1].log_softmax(-1)
        if ours.argmax() > 8 and "\ufffd" not in tokenizer.decode(ours.argmax()):
            break
    theirs = LlamaCpp(path).likeliest(document[:-1].tolist(), 500)
    assert len(theirs) == 500
    return max(abs(ours[token].item() - value) for token, value in theirs.items())


# --- what is computed


@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_computes_the_same(tmp_path, tokenizer, name):
    model = lively(**{**WRITTEN[name], "vocab_size": VOCABULARY})
    write_gguf(tmp_path / "m.gguf", model, tokenizer, name, "f32")
    assert difference(model, tmp_path / "m.gguf", tokenizer) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, tokenizer, name):
    model = lively(**{**SHAPES[name][1], "vocab_size": VOCABULARY})
    with pytest.raises(ValueError, match=REFUSED[name]):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, name, "f32")
    assert not list(tmp_path.iterdir())


def test_a_ramp_that_is_not_rounded_is_refused_for_a_reason(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(gguf_file, "shape_problems", lambda config: [])
    for truncate, low, high in ((True, 0, 1e-4), (False, 0.1, 99)):
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": truncate}
        model = lively(vocab_size=VOCABULARY, head_dim=64, rope_scaling=yarn)
        write_gguf(tmp_path / "m.gguf", model, tokenizer, "yarn", "f32")
        assert low <= difference(model, tmp_path / "m.gguf", tokenizer) <= high


@pytest.mark.parametrize("name", ["llama", "llama untied", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_reads_it_back(tmp_path, small_tokenizer, name):
    from transformers import AutoModelForCausalLM

    # Whatever a file says, its reader takes a head of qwen3 for 128 wide and an expert for 768.
    width = {"qwen3": {"head_dim": 128}, "qwen3_moe": {"moe_intermediate_size": 768}}.get(name, {})
    model = lively(**{**WRITTEN[name], "vocab_size": 720, **width})
    write_gguf(tmp_path / "m.gguf", model, small_tokenizer, name, "f32")
    document = tokens(40, 5, 720)
    network = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = network(input_ids=document[None, :-1]).logits[0]
    torch.testing.assert_close(logits_of(model, pack([document])), theirs, rtol=0, atol=1e-4)


def test_smaller_numbers_make_smaller_files_and_nearly_the_same(tmp_path, small_tokenizer):
    """Rows of 72 are no multiple of the 32 numbers that share a scale: such matrices stay in float16."""
    import gguf

    model = lively(vocab_size=720, intermediate_size=72)
    found, sizes = {}, {}
    for dtype in DTYPES:
        path = tmp_path / f"{dtype}.gguf"
        write_gguf(path, model, small_tokenizer, "m", dtype)
        found[dtype], sizes[dtype] = difference(model, path, small_tokenizer), path.stat().st_size
    assert found["f32"] < 1e-4 < found["f16"] < found["bf16"] < 1 and found["q8_0"] < 1
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.1.ffn_norm.weight"] == "F32"


def test_numbers_that_float16_has_not_are_refused(tmp_path, tokenizer):
    model = lively(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    (tmp_path / "m.gguf").write_text("the one before")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds numbers that float16 has not"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, "m", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "the one before"


# --- how text is cut


def test_text_is_cut_as_by_our_tokenizer(tmp_path, tokenizer):
    write_gguf(tmp_path / "m.gguf", lively(vocab_size=VOCABULARY), tokenizer, "m", "f32")
    theirs = LlamaCpp(tmp_path / "m.gguf")
    assert [text for text in TEXTS if theirs.token_ids(text) != tokenizer(text).input_ids] == []
    assert len(TEXTS) > 400


@pytest.mark.parametrize("name", CUTS)
def test_text_is_cut_as_by_other_families(tmp_path, name):
    tokenizer = trained_tokenizer(CUTS[name], whole_words=PRE_TOKENIZERS[name][1], bos=name == "llama-bpe")
    write_gguf(tmp_path / "m.gguf", lively(vocab_size=720), tokenizer, "m", "f32")
    theirs = LlamaCpp(tmp_path / "m.gguf")
    assert [text for text in TEXTS if theirs.token_ids(text) != tokenizer(text).input_ids] == []
    assert adds_bos(tokenizer) == (name == "llama-bpe") == (tokenizer("x").input_ids[0] == 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex("x"), "isolated")),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t.model, "ignore_merges", True),
        lambda t: t.add_special_tokens([AddedToken("<x>", lstrip=True)]),
    ],
)
def test_another_way_to_cut_text_is_refused(tmp_path, change):
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    change(tokenizer.backend_tokenizer)
    with pytest.raises(
        ValueError, match=r"cuts text in a way that is none of llama\.cpp's gpt-2, .*convert_hf_to_gguf"
    ):
        write_gguf(tmp_path / "m.gguf", lively(vocab_size=VOCABULARY + 1), tokenizer, "m", "f32")


def test_a_text_that_gets_an_end_and_a_vocabulary_that_is_too_small_are_refused(tmp_path, tokenizer):
    ended = load_tokenizer(str(OWN_TOKENIZER))
    template = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    ended.backend_tokenizer.post_processor = template
    with pytest.raises(ValueError, match="adds more to a text than a first token"):
        write_gguf(tmp_path / "m.gguf", lively(vocab_size=VOCABULARY), ended, "m", "f32")
    with pytest.raises(ValueError, match="the tokenizer has 6400 entries, the vocabulary of the model 97"):
        write_gguf(tmp_path / "m.gguf", lively(), tokenizer, "m", "f32")


# --- what is answered, by the commands


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "final"
    export_learnt(directory, [row["messages"] for row in held_out_conversations()[::9]])
    return directory


def test_llama_cpp_answers_as_we_do(final, capsys):
    assert main(["gguf", str(final.parent)]) == 0
    path = final.parent / "model-f32.gguf"
    assert capsys.readouterr().out == f"written to {path}: {path.stat().st_size:,} bytes\n"
    assert compare([str(final), str(path), "--limit", "24", "--max_new_tokens", "48"]) == 0
    found = capsys.readouterr().out
    assert found == f"24 of 24 answers and the tokens of {len(TEXTS)} of {len(TEXTS)} texts are the same\n"


def test_stop_tokens_without_a_place_are_named(final, tmp_path, capsys):
    copy = tmp_path / "final"
    shutil.copytree(final, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 3, 4, 5]}))
    assert main(["gguf", str(copy)]) == 0
    assert "no place for these stop tokens: </tool_call> <tool_response>;" in capsys.readouterr().out
    fields = GGUFReader(tmp_path / "model-f32.gguf").fields
    assert [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot", "eom")] == [2, 0, 3]


def test_another_model_answers_otherwise(final, tokenizer, tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", lively(vocab_size=VOCABULARY), tokenizer, "m", "q8_0")
    assert compare([str(final), str(tmp_path / "m.gguf"), "--limit", "3", "--max_new_tokens", "8"]) == 1
    assert "0 of 3 answers" in capsys.readouterr().out


def test_errors_say_what_to_do(final, tmp_path, capsys):
    foreign(tmp_path / "gemma", "Gemma2")
    for words, message in (
        ([tmp_path / "absent"], "absent does not exist: name an exported model"),
        ([tmp_path / "gemma"], "holds Gemma2ForCausalLM, which is not written here; convert_hf_to_gguf.py"),
        ([final, "--out", tmp_path], "is a directory, name a file in it"),
    ):
        assert main(["gguf", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert compare([str(final), str(tmp_path / "absent.gguf")]) == 2
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["gguf", str(final), "--dtype", "q2"])
    assert caught.value.code == 2 and set(DTYPES) == set(gguf_file.DTYPES)
