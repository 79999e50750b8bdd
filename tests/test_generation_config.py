"""An exported model stops where its answers were trained to end: the judge is plain `generate` of transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dataset.chat import ChatRenderer
from dataset.questions import question_of
from dataset.rows import Document, collate
from dataset.tokenizer import vocabulary_size
from model.build import OWN_TOKENIZER, ModelRequest, load_tokenizer
from model.decoder import DecoderConfig
from model.export import export_model
from model.generation_config import check_base, generation_config, stop_ids
from model.loading import build_model
from model.losses import sft_objective
from scripts.chat import main as chat
from scripts.checkpoints import main as checkpoints
from scripts.templates.families import twins
from tests.small_world import log_of, train
from tests.tiny_model import foreign

OF_THE_BASE = {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
ANSWER = "Hello there!"
ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": {"word": "x"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}}}}]  # fmt: skip


def stopped_at(directory: Path, prompt: list[int], adapter: Path | None = None) -> list[int]:
    """The new tokens of transformers' greedy `generate`, told nothing of where to stop."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory)
    options = {"do_sample": False, "max_new_tokens": 200, "temperature": None, "top_p": None}
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
        options["generation_config"] = GenerationConfig.from_pretrained(adapter)
    else:
        options["tokenizer"] = AutoTokenizer.from_pretrained(directory)  # for texts at which to stop
    new = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    return new[0, len(prompt) :].tolist()


@pytest.fixture
def base(tmp_path):
    """A pretrained model whose tokenizer ends texts, but not turns, with its eos token."""

    def make(family: str = "Llama", **changes) -> Path:
        directory = tmp_path / "base"
        foreign(directory, family, **{"vocab_size": 6400, **changes})
        for file in OWN_TOKENIZER.iterdir():
            shutil.copy(file, directory)
        said = json.loads((directory / "tokenizer_config.json").read_text())
        said |= {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        (directory / "tokenizer_config.json").write_text(json.dumps(said))
        (directory / "generation_config.json").write_text(json.dumps(OF_THE_BASE))
        return directory

    return make


def prompt_of(directory: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    question = ROWS[0]["messages"][:1]
    return tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]


LORA = {"lora_rank": 16, "lora_alpha": 64.0, "learning_rate": 0.02, "max_steps": 120}
PATHS = {
    "built-in": ("Llama", {}),
    "built-in, LoRA": ("Llama", LORA),
    "transformers": ("Gemma2", {}),
    "transformers, LoRA": ("Gemma2", LORA),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "built-in")) for name in PATHS]
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
def test_every_directory_of_a_run_stops_where_training_did(tmp_path, base, name):
    family, changes = PATHS[name]
    source, run, data = (
        base(family, initializer_range=0.3 if changes else 0.02),
        tmp_path / "run",
        tmp_path / "rows.jsonl",
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 8))
    flags = {"learning_rate": 0.01, "max_steps": 60, "epochs": 60, "lr_schedule": "constant", "dropout": 0.0, **changes}
    for shape in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        flags[shape] = None
    flags |= {"data_path": str(data), "val_data_path": str(data), "eval_interval": 30, "save_interval": "30",
              "save_top_k": 1}  # fmt: skip
    assert train(1, run, from_weight=str(source), **flags) == [0], log_of(run)
    assert checkpoints(["export", str(run)]) == 0

    places = [run / "final", run / "best", *run.glob("export-step-*")]
    assert len(places) == 3
    for place in places:
        said = json.loads((place / "generation_config.json").read_text())
        assert {key: said[key] for key in OF_THE_BASE} == OF_THE_BASE
        assert json.loads((place / "config.json").read_text())["eos_token_id"] == OF_THE_BASE["eos_token_id"]
    tokenizer, prompt = load_tokenizer(str(run / "final")), prompt_of(run / "final")
    expected = [
        *tokenizer(ANSWER, add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
    for place in (run / "final", places[-1]):
        assert stopped_at(place, prompt) == expected, place
    if "LoRA" in name:
        assert stopped_at(source, prompt, run / "final" / "adapter") == expected


# --- every template that trl ships with a twin, and ours


def learnt(directory: Path, tokenizer, messages: list, tools: list | None) -> tuple[list[int], list[int]]:
    """Export a model that answers one question as the row does; returns the prompt, and what it should add."""
    renderer = ChatRenderer(tokenizer)
    sample = renderer.render(messages, tools)
    question = question_of(0, sample.ids, sample.supervised)
    batch = collate([[Document(0, sample.ids, sample.supervised)]])
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    size = vocabulary_size(tokenizer)
    model = build_model(DecoderConfig(vocab_size=size, max_position_embeddings=4096, **shape), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):  # how many it takes is a matter of the processor's roundings
        loss = sft_objective(model, batch)["ce"] / len(batch["targets"])
        if loss < 0.002:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generation = generation_config(ModelRequest(), tokenizer, renderer.end_ids, renderer.end_texts)
    export_model(directory, model, tokenizer, generation=generation)
    return question.prompt, [*question.expected, question.end]


CASES = {case.name: case for case in twins()}
TEXT_PROMPT = "User: Hi\n\nAssistant: "
ANSWERED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]
CALLED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
FAST = [name for name in CASES if name in ("glm4moe", "gptoss", "llama3")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in CASES])
def test_each_family_stops_after_an_answer_and_after_a_call(tmp_path, name):
    tokenizer, stopped = CASES[name].tokenizer, 0
    for messages, tools in ((ANSWERED, None), (CALLED, TOOLS)):
        try:
            prompt, expected = learnt(tmp_path / str(stopped), tokenizer, messages, tools)
        except ValueError as error:  # said at preparation: the template writes no calls
            assert tools, error
            continue
        assert stopped_at(tmp_path / str(stopped), prompt) == expected
        stopped += 1
    assert stopped


def test_the_small_lane_has_its_families():
    assert len(FAST) == 3


TEXT = """\
{%- for message in messages %}{{ message.role | capitalize + ': ' + message.content + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""


def test_a_turn_that_text_closes_ends_there_in_chat_and_in_transformers(tmp_path, capsys):
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    tokenizer.chat_template = TEXT
    longer = [*ANSWERED, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]
    learnt(tmp_path, tokenizer, longer, None)
    assert json.loads((tmp_path / "generation_config.json").read_text())["stop_strings"] == ["\n\n"]
    assert chat([str(tmp_path), "--device", "cpu", "--prompt", "Hi", "--prompt", "Hi"]) == 0
    assert capsys.readouterr().out.split("\n\n") == [ANSWER, f"\n{ANSWER}", "\n"]
    new = stopped_at(tmp_path, tokenizer(TEXT_PROMPT, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(new) == f"{ANSWER}\n\n"


def test_an_answer_that_holds_what_closes_answers_is_spoken_of():
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    tokenizer.chat_template = TEXT
    said = "an answer contains '\\n\\n', at which the trained model stops: another --chat_template"
    for answer, expected in ((ANSWER, False), (f"{ANSWER}\n\nBye.", True)):
        messages = [*ANSWERED[:1], {"role": "assistant", "content": answer}]
        assert (said in ChatRenderer(tokenizer).render(messages).notes) == expected


# --- what the file says


def config_of(tmp_path: Path, tokenizer, **files) -> dict:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if "config" not in files:
        (tmp_path / "config.json").write_text("{}")
    renderer = ChatRenderer(tokenizer)
    return generation_config(ModelRequest(str(tmp_path)), tokenizer, renderer.end_ids, renderer.end_texts)


def test_a_base_keeps_what_it_says_and_words_do_not_stop_it(tmp_path):
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    said = config_of(tmp_path, tokenizer, generation_config={"eos_token_id": [1, 500], "top_k": 3, "bos_token_id": 600})
    assert said == {"eos_token_id": [1, 2], "top_k": 3, "bos_token_id": None, "pad_token_id": 0}


def test_the_tokens_of_config_json_serve_where_no_generation_config_lies(tmp_path):
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    said = config_of(tmp_path, tokenizer, config={"eos_token_id": 0, "hidden_size": 8})
    assert said == {"eos_token_id": [0, 2], "bos_token_id": None, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert stop_ids(tmp_path) == [0, 2]


def test_new_weights_stop_at_the_end_of_a_turn_and_decode_greedily():
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    said = generation_config(ModelRequest(), tokenizer, {2}, ["\n\n"])
    assert said == {
        "do_sample": False, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0, "stop_strings": ["\n\n"],
    }  # fmt: skip


def test_a_text_to_stop_at_may_stand_alone(tmp_path):
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    assert config_of(tmp_path, tokenizer, generation_config={"stop_strings": "### Human"})["stop_strings"] == [
        "### Human"
    ]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"pad_token_id": [2]}, r"generation_config.json: pad_token_id must be a token's id, found \[2\]"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token's id or a list of them, found '2'"),
        ({"stop_strings": 5}, "stop_strings must be texts, found 5"),
        ({"stop_strings": ["a", 5]}, "stop_strings must be texts, found"),
    ],
)
def test_what_no_reader_takes_is_refused_before_training(tmp_path, base, said, message):
    source, data = base(), tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n")
    (source / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        check_base(ModelRequest(str(source)), load_tokenizer(str(source)))
    shapes = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    assert train(1, tmp_path / "run", from_weight=str(source), data_path=str(data), **shapes) == [2]
    assert "must be" in log_of(tmp_path / "run") and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ids_of_the_base_become_those_of_another_tokenizer(tmp_path, base, caplog):
    """By its number, </tool_call> of the one is <tool_call> of the other, and answers would stop before their call."""
    source, other = base(), tmp_path / "other"
    shutil.copytree(OWN_TOKENIZER, other)
    backend = json.loads((other / "tokenizer.json").read_text())
    first, second = backend["added_tokens"][3:5]
    first["content"], second["content"] = second["content"], first["content"]
    words = backend["model"]["vocab"]
    words[first["content"]], words[second["content"]] = first["id"], second["id"]
    (other / "tokenizer.json").write_text(json.dumps(backend))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [second["id"]]}))
    tokenizer, request = load_tokenizer(str(other)), ModelRequest(str(source))
    assert generation_config(request, tokenizer, (), ())["eos_token_id"] == [first["id"], tokenizer.eos_token_id]
    with caplog.at_level("WARNING"):
        check_base(request, tokenizer)
    assert f"2 of the 6400 tokens of {source} are other ones in {other}" in caplog.text
