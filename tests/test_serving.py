"""Who else reads exported models: an OpenAI client through `transformers serve`, and transformers 4."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.demo import held_out_conversations
from model.build import OWN_TOKENIZER, load_tokenizer
from model.export import export_model
from model.loading import load_model
from scripts.chat import main as chat
from scripts.verify.ranks import free_port
from tests.small_world import export_learnt
from tests.test_families import SHAPES, lively
from tests.tiny_model import foreign, logits_of, pack, tokens

QUESTIONS = ["Spell the word 'river' backwards.", "Count the letters: F I P E N", "再见"]


@pytest.mark.slow
def test_transformers_serve_answers_an_openai_client_as_we_do(tmp_path, capsys):
    export_learnt(tmp_path / "final", [row["messages"] for row in held_out_conversations()[::9]])
    prompts = [word for question in QUESTIONS for word in ("--prompt", question, "--prompt", "/reset")]
    assert chat([str(tmp_path / "final"), "--device", "cpu", "--max_new_tokens", "32", *prompts]) == 0
    expected = capsys.readouterr().out.splitlines()
    assert len(set(expected)) == len(QUESTIONS)

    model, port = str(tmp_path / "final"), str(free_port())
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--port", port, "--device", "cpu"]
    with open(tmp_path / "log", "w") as log, httpx2.Client(trust_env=False) as direct:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", http_client=direct)
            wait_for(client, server)
            for stream in (False, True):
                answers = [ask(client, model, question, stream) for question in QUESTIONS]
                assert [answer.rstrip() for answer in answers] == [answer.rstrip() for answer in expected]
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_for(client, server, seconds: float = 120) -> None:
    for _ in range(int(seconds)):
        assert server.poll() is None
        try:
            client.get("../health", cast_to=str)
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise TimeoutError("the server does not answer")


def ask(client, model: str, question: str, stream: bool) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=32, stream=stream
    )
    if not stream:
        return answer.choices[0].message.content
    return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)


# --- transformers 4


READ_BY_OLD = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file

assert transformers.__version__ == "4.57.1"
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"  # the other one leaves out Gemma's cap there
    )
    assert not any(info.values()), (directory, info)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(json.loads(sys.argv[2]), add_generation_prompt=True)
    model.generate(**tokenizer("Hi", return_tensors="pt"), max_new_tokens=2)  # takes all that the tokenizer makes
    document = load_file(directory / "document.safetensors")["ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=document[None]).logits[0]
    save_file({"logits": logits, "chat": torch.tensor(ids)}, directory / "read.safetensors")
"""
CHAT = [{"role": "user", "content": "Größe 12?"}]
FOREIGN = {
    "gemma2": ("Gemma2", {"sliding_window": 4}),
    "mistral": ("Mistral", {"sliding_window": 4, "tie_word_embeddings": True}),
    "mistral linear": ("Mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0}}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
}


def with_a_list_of_special_tokens(directory: Path):
    """Our tokenizer as transformers 5 loads one whose files name more special tokens, as most on the Hub do."""
    shutil.copytree(OWN_TOKENIZER, directory, dirs_exist_ok=True)
    file = directory / "tokenizer_config.json"
    said = json.loads(file.read_text()) | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    file.write_text(json.dumps(said))
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.extra_special_tokens
    return tokenizer


@pytest.mark.slow
def test_transformers_4_reads_what_is_exported(tmp_path, old_packages):
    models, documents = tmp_path / "models", {}
    for name, (_, changes) in SHAPES.items():
        export_model(models / name, lively(**changes), OWN_TOKENIZER)
    for name, (family, changes) in FOREIGN.items():
        foreign(tmp_path / name, family, **changes)
        export_model(models / name, load_model(tmp_path / name), with_a_list_of_special_tokens(tmp_path / "tokenizer"))
    for name in (*SHAPES, *FOREIGN):
        documents[name] = tokens(60, 3)
        save_file({"ids": documents[name][:-1]}, models / name / "document.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(old_packages), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", READ_BY_OLD, models, json.dumps(CHAT)], env=environment, cwd=tmp_path, check=True
    )
    chat = load_tokenizer(str(OWN_TOKENIZER)).apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    for name, document in documents.items():
        read, model = load_file(models / name / "read.safetensors"), load_model(models / name)
        with torch.no_grad():
            ours = logits_of(model, pack([document]))
        assert (ours - read["logits"]).abs().max() < 1e-4 < 1 < ours.abs().max(), name
        assert read["chat"].tolist() == chat
