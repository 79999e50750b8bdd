"""Code of a repository runs where the user asks for it, of the Hub only at a named commit, and nowhere else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.build import ModelRequest, choose_model, load_tokenizer
from model.export import export_model
from model.loading import load_model, load_skeleton
from model.transformers_model import HFCausalLM
from model.trust import Trust, UnsafeModelError
from scripts.chat import main as chat
from scripts.verify.ranks import run_ranks, train_rank
from tests.small_world import TINY, log_of, records_of, write_rows
from tests.test_export import TOKENIZER
from tests.tiny_model import foreign, logits_of, pack, tiny, tokens
from training.config.config import Config, ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from transformers import MistralConfig, MistralForCausalLM


class OwnConfig(MistralConfig):
    model_type = "own"


class OwnForCausalLM(MistralForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        open({canary!r}, "a").close()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory whose model is a class of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "own"
    foreign(directory, "Mistral", vocab_size=6400)
    for file in TOKENIZER.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_class_of_its_own_is_refused_and_computes_where_it_is_trusted(own, tmp_path):
    for load in (load_model, load_skeleton):
        with pytest.raises(UnsafeModelError, match="needs code of its own .* unless --trust_remote_code"):
            load(own)
    assert not (tmp_path / "canary").exists()
    trusted = load_model(own, trust=Trust(code=True))
    assert (tmp_path / "canary").exists() and type(trusted.inner).__name__ == "OwnForCausalLM"
    assert type(load_skeleton(own, trust=Trust(code=True)).inner).__name__ == "OwnForCausalLM"
    foreign(tmp_path / "plain", "Mistral", vocab_size=6400)
    assert isinstance(load_skeleton(tmp_path / "plain", trust=Trust(code=True)), HFCausalLM)
    batch = pack([tokens(12, 1), tokens(9, 2)])
    plain = load_model(tmp_path / "plain")
    assert isinstance(plain, HFCausalLM) and torch.equal(logits_of(plain, batch), logits_of(trusted, batch))

    export_model(tmp_path / "final", trusted, TOKENIZER)
    again = load_model(tmp_path / "final", trust=Trust(code=True))
    assert torch.equal(logits_of(again, batch), logits_of(trusted, batch))
    with pytest.raises(UnsafeModelError):
        load_model(tmp_path / "final")


def test_trust_covers_what_lies_there_and_nothing_else(own, tmp_path):
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "owner/name--own.OwnForCausalLM"
    (own / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_skeleton):
        with pytest.raises(UnsafeModelError, match="code of another repository"):
            load(own, trust=Trust(code=True))
    with pytest.raises(UnsafeModelError, match="code of another repository"):
        load_tokenizer(str(own), trust=Trust(code=True))
    request = ModelRequest(from_weight=str(own), trust_remote_code=True)
    assert request.trust_in(str(own)).code and not request.trust_in("elsewhere").code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"from_weight": "owner/name", "trust_remote_code": True}, "--revision with 40 hex digits, not None"),
        ({"from_weight": "owner/name", "trust_remote_code": True, "revision": "main"}, "40 hex digits, not main"),
        ({"from_weight": "owner/name", "trust_remote_code": True, "revision": COMMIT[1:]}, "40 hex digits, not 1234"),
        ({"trust_remote_code": True}, "--trust_remote_code needs --from_weight"),
        ({"revision": "v1"}, "--revision v1 is of a Hub id, and --from_weight none is none"),
        ({"from_weight": "model", "revision": "v1"}, "--revision v1 is of a Hub id, and --from_weight model is none"),
    ],
)
def test_code_without_a_commit_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        Config(**flags)


def test_a_named_commit_is_asked_for(monkeypatch):
    config = Config(from_weight="owner/name", trust_remote_code=True, revision=COMMIT)
    assert Config(from_weight="owner/name", revision="v1").model_request["revision"] == "v1"
    asked = []
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **options: asked.append(options["revision"]))
    monkeypatch.setattr(
        HFCausalLM, "from_pretrained", classmethod(lambda cls, source, trust: asked.append(trust) or 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        choose_model(ModelRequest(**config.model_request), 10)
    trust = Trust(COMMIT, code=True)
    assert set(asked[:-1]) == {COMMIT} and asked[-1] == trust
    assert trust.options() == {"revision": COMMIT, "code_revision": COMMIT, "trust_remote_code": True}
    assert Trust().options() == {"revision": "main", "code_revision": None, "trust_remote_code": False}


def test_a_run_trains_it_and_its_result_answers(own, tmp_path, capsys):
    flags = {
        **TINY, "data_path": str(write_rows(tmp_path / "rows.jsonl", 6)), "from_weight": str(own), "epochs": 1,
        "cache_dir": str(tmp_path / "cache"), "dropout": 0, "batch_size": 4,
        **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    }  # fmt: skip
    run = tmp_path / "run"
    for trusted, code in ((0, 77), (1, 0)):
        values = {**flags, "save_dir": str(run), "trust_remote_code": trusted, "overwrite": 1}
        assert run_ranks(train_rank, 1, (values, str(run), None)) == [code], log_of(run)
        assert (tmp_path / "canary").exists() == bool(trusted)
    assert len(records_of(run, "train")) > 0
    talk = [str(run), "--prompt", "Say 1", "--max_new_tokens", "2"]
    assert chat(talk) == 77
    assert chat([*talk, "--trust_remote_code"]) == 0


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_reads_like_the_start_of_a_pickle_is_none(tmp_path, length):
    export_model(tmp_path / "model", tiny(), TOKENIZER)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"note": ""})
    now = int.from_bytes(file.read_bytes()[:8], "little")
    save_file(tensors, file, metadata={"note": "x" * ((length - now) % 0x10000)})
    assert file.read_bytes()[:2] == length.to_bytes(2, "little")
    load_model(tmp_path / "model")
