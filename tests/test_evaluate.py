"""What the evaluation reports is what a count by hand gives, on a model that knows some answers and no others."""

import json
import math
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from dataset.chat import ChatRenderer
from dataset.packing import plan_rows
from dataset.rows import Document, collate
from model.build import OWN_TOKENIZER, load_tokenizer
from model.decoder import DecoderConfig
from model.export import export_model
from model.loading import build_model, load_model
from model.losses import sft_objective
from scripts.evaluate import answer_all, exact_matches, final_number, main, read_cases, spread

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "exact_match", "exact_match_by_family_mean", "by_family", "loss", "perplexity", "token_accuracy", "samples",
    "cut_answers", "data_path", "model", "generated_tokens_per_second", "examples",
}  # fmt: skip


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


LEARNT = [
    {"family": "colours", "messages": turns("What is the sky?", "The sky is blue.")},
    {"family": "colours", "messages": turns("What is snow?", "Snow is white.")},
    {"messages": turns("My name is Ada.", "Hello, Ada!", "Who am I?", "Your name is Ada.")},
    {"family": "chinese", "messages": turns("<|im_end|> 三用数字怎么写？", "  三是 3。\n")},
]
OTHERS = [
    {"family": "colours", "messages": turns("What is grass?", "Grass is green.")},
    {"family": "other", "messages": turns("Why?", "Because.")},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not strict JSON")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(OWN_TOKENIZER))


@pytest.fixture(scope="module")
def trained_run(tokenizer, tmp_path_factory) -> Path:
    """A finished run whose model has LEARNT by heart."""
    renderer = ChatRenderer(tokenizer)
    samples = [renderer.render(row["messages"]) for row in LEARNT]
    batch = collate([[Document(i, sample.ids, sample.supervised) for i, sample in enumerate(samples)]])
    config = DecoderConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = build_model(config, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = sft_objective(model, batch)["ce"] / len(batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    run = tmp_path_factory.mktemp("runs") / "run"
    (run / "checkpoints").mkdir(parents=True)
    export_model(run / "final", model, OWN_TOKENIZER)
    return run


@pytest.fixture(scope="module")
def evaluate(trained_run, tmp_path_factory):
    """Evaluates rows and returns the content of the result file."""
    directory = tmp_path_factory.mktemp("evaluate")

    def call(rows: list[dict], *flags: str, model: Path = trained_run / "final") -> dict:
        data, out = write(directory / "rows.jsonl", rows), directory / "out" / "result.json"
        paths = ["--data_path", str(data), "--cache_dir", str(directory / "cache"), "--out", str(out)]
        assert main([str(model), *paths, "--device", "cpu", *flags]) == 0
        return json.loads(out.read_text(encoding="utf-8"), parse_constant=refuse_constant)

    return call


@pytest.fixture(scope="module")
def of_all(evaluate) -> dict:
    return evaluate(LEARNT + OTHERS)


def test_what_is_known_by_heart_is_right_and_nothing_else(evaluate):
    result = evaluate(LEARNT)
    assert (result["exact_match"], result["exact_match_by_family_mean"], result["samples"]) == (1.0, 1.0, 4)
    assert result["loss"] < 0.02 and result["token_accuracy"] == 1.0
    result = evaluate(OTHERS)
    assert (result["exact_match"], result["exact_match_by_family_mean"], result["samples"]) == (0.0, 0.0, 2)
    assert result["loss"] > 1


def test_means_over_samples_and_over_families(of_all):
    result = of_all
    assert set(result) == KEYS
    assert result["by_family"] == {
        "colours": {"exact_match": 2 / 3, "count": 3},
        "all": {"exact_match": 1.0, "count": 1},
        "chinese": {"exact_match": 1.0, "count": 1},
        "other": {"exact_match": 0.0, "count": 1},
    }
    assert result["exact_match"] == 4 / 6
    assert result["exact_match_by_family_mean"] == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    assert result["generated_tokens_per_second"] > 0
    assert [example["correct"] for example in result["examples"]] == [True] * 4 + [False] * 2


def test_an_answer_must_be_the_whole_text():
    examples = [{"family": "x", "correct": True}, {"family": "x", "correct": False}, {"family": "y", "correct": False}]
    assert exact_matches(examples)["exact_match"] == 1 / 3
    assert exact_matches(examples)["exact_match_by_family_mean"] == 1 / 4


def test_examples_hold_what_the_model_saw_and_wrote(evaluate, of_all):
    two_turns, spelled = of_all["examples"][2:4]
    assert two_turns == {
        "prompt": "<|im_start|>user\nMy name is Ada.<|im_end|>\n<|im_start|>assistant\nHello, Ada!<|im_end|>\n"
        "<|im_start|>user\nWho am I?<|im_end|>\n<|im_start|>assistant\n",
        "expected": "Your name is Ada.", "answer": "Your name is Ada.", "family": "all", "correct": True,
    }  # fmt: skip
    assert spelled["expected"] == spelled["answer"] == "  三是 3。\n"  # not even spaces are stripped
    wrong = LEARNT[3] | {"messages": turns("<|im_end|> 三用数字怎么写？", "三是 3。")}
    assert not evaluate([wrong])["examples"][0]["correct"]


def test_the_loss_is_that_of_transformers_on_each_conversation_alone(evaluate, of_all, tokenizer, trained_run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained_run / "final")
    renderer = ChatRenderer(tokenizer)
    loss, right, count = 0.0, 0, 0
    for row in LEARNT + OTHERS:
        sample = renderer.render(row["messages"])
        ids, mask = torch.from_numpy(sample.ids), torch.from_numpy(sample.supervised[1:])
        with torch.no_grad():
            logits, targets = model(ids[None]).logits[0, :-1][mask], ids[1:][mask]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
    assert of_all["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert of_all["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert of_all["token_accuracy"] == pytest.approx(right / count)
    assert evaluate(OTHERS)["loss"] != pytest.approx(loss / count, rel=1e-2)


def test_prompts_are_those_of_training(tokenizer, trained_run, tmp_path):
    from dataset.prepare import DataOptions, prepare

    path = write(tmp_path / "rows.jsonl", LEARNT + OTHERS)
    store = prepare(path, tokenizer, DataOptions(), tmp_path, echo=lambda _: None)
    renderer = ChatRenderer(tokenizer)
    cases = read_cases(path, store, limit=None)
    assert plan_rows(store.lengths, 4096).num_samples == len(cases) == 6
    for case, row in zip(cases, LEARNT + OTHERS, strict=True):
        assert case.prompt == renderer.prompt_ids(row["messages"][:-1])
        assert [*case.prompt, *case.expected, tokenizer.eos_token_id] == store.tokens(case.sample)[0].tolist()
        assert tokenizer.decode(case.expected) == row["messages"][-1]["content"]
    assert [case.family for case in cases] == ["colours", "colours", "all", "chinese", "colours", "other"]


def test_the_batch_size_changes_no_answer(evaluate, of_all):
    assert evaluate(LEARNT + OTHERS, "--batch_size", "1")["examples"] == of_all["examples"]


def test_an_answer_that_has_not_ended_is_wrong(evaluate, tokenizer):
    """The last permitted token has to be the end of the turn."""
    tokens = len(tokenizer("The sky is blue.").input_ids)
    ended = evaluate(LEARNT[:1], "--max_new_tokens", str(tokens + 1))
    assert (ended["exact_match"], ended["cut_answers"]) == (1.0, 0)
    cut = evaluate(LEARNT[:1], "--max_new_tokens", str(tokens))
    assert cut["examples"][0]["answer"] == "The sky is blue."
    assert (cut["exact_match"], cut["cut_answers"]) == (0.0, 1)


def test_the_context_of_the_model_is_used_to_its_end_and_never_passed(
    trained_run, tokenizer, tmp_path, evaluate, capsys
):
    final = shutil.copytree(trained_run / "final", tmp_path / "small")
    config = json.loads((final / "config.json").read_text())
    longest = len(ChatRenderer(tokenizer).render(LEARNT[2]["messages"]).ids) - 1  # the last one is only a target
    for context, exit_code in ((longest, 0), (longest - 1, 65)):
        (final / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
        data = write(tmp_path / "rows.jsonl", LEARNT)
        flags = ["--data_path", str(data), "--cache_dir", str(tmp_path / "cache"), "--device", "cpu"]
        assert main([str(final), *flags]) == exit_code
    assert "OVERLONG" in capsys.readouterr().err
    assert json.loads((final / "evaluation.json").read_text())["exact_match"] == 1.0  # beside a model that is in no run
    model = load_model(final)
    prompt = ChatRenderer(tokenizer).prompt_ids(turns("Why?"))
    (answer, cut), (short, _) = answer_all(model, [prompt, prompt[:-1]], 512, 8, ends=set())
    assert cut and (len(answer), len(short)) == (longest - len(prompt), longest - len(prompt) + 1)


def test_limit_takes_conversations_from_the_whole_file(evaluate):
    assert spread(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread(list("abc"), 9) == list("abc")
    result = evaluate(LEARNT + OTHERS, "--limit", "2")
    assert result["samples"] == len(result["examples"]) == 2
    assert set(result["by_family"]) == {"colours", "chinese"}
    assert result["loss"] == pytest.approx(evaluate([LEARNT[0], LEARNT[3]])["loss"], rel=1e-6)


def test_the_demo_is_the_default_and_the_result_lies_in_the_run(trained_run, tmp_path, capsys):
    assert (
        main([str(trained_run), "--limit", "10", "--show", "1", "--cache_dir", str(tmp_path), "--device", "cpu"]) == 0
    )
    result = json.loads((trained_run / "evaluation.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert sorted(p.name for p in trained_run.iterdir()) == ["checkpoints", "evaluation.json", "final"]
    assert result["samples"] == 10 and len(result["by_family"]) == 7
    assert result["data_path"] == str(tmp_path / "demo" / "heldout.jsonl")
    assert result["model"] == str(trained_run / "final")
    printed = capsys.readouterr().out.splitlines()
    (head,) = (at for at, line in enumerate(printed) if line.endswith("count  exact match"))
    assert printed[0] == "<|im_start|>user"
    assert printed[head + 1].split() == ["addition", "2", "0.0%"]
    assert printed[head + 9].split() == ["mean", "of", "samples", "10", "0.0%"]
    assert len({len(line) for line in printed[head : head + 10]}) == 1
    assert "answer ✗" in "\n".join(printed)


def test_columns_are_named_as_for_the_trainer(evaluate):
    rows = [{"question": "What is snow?", "answer": "Snow is white.", "family": 7}]
    result = evaluate(rows, "--prompt_field", "question", "--response_field", "answer")
    assert result["by_family"] == {"7": {"exact_match": 1.0, "count": 1}}


def test_a_broken_model_gives_strict_json(evaluate, tmp_path):
    model = build_model(DecoderConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), seed=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    export_model(tmp_path / "broken", model, OWN_TOKENIZER)
    result = evaluate(LEARNT, "--max_new_tokens", "2", model=tmp_path / "broken")
    assert result["loss"] is None and "loss" in result["non_finite"]


def test_errors_say_what_to_do(trained_run, tmp_path, capsys):
    def failure(*words: object) -> tuple[int, str]:
        code = main([*map(str, words), "--cache_dir", str(tmp_path / "cache"), "--device", "cpu"])
        return code, capsys.readouterr().err

    code, message = failure(tmp_path / "absent")
    assert code == 2 and "absent does not exist: name an exported model" in message
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, message = failure(tmp_path / "run")
    assert code == 2 and "has neither config.json nor final/" in message
    code, message = failure(trained_run, "--data_path", write(tmp_path / "empty.jsonl", []))
    assert code == 65 and "empty.jsonl:0: EMPTY_FILE" in message
    code, message = failure(trained_run, "--data_path", write(tmp_path / "bad.jsonl", [LEARNT[0], {"messages": []}]))
    assert code == 65 and "bad.jsonl:2: BAD_TYPE" in message
    code, message = failure(trained_run, "--data_path", tmp_path / "none.jsonl")
    assert code == 65 and "none.jsonl:0: NO_FILE" in message
    code, message = failure(trained_run, "--prompt_field", "question")
    assert code == 2 and "prompt and response go together" in message
    for words in (["--limit", "0"], ["--device", "tpu"], []):
        with pytest.raises(SystemExit) as caught:
            main([*words, *([str(trained_run)] if words else [])])
        assert caught.value.code == 2


def test_flags_are_read_before_anything_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import sys, scripts.chat, scripts.evaluate as e; e.parse(['run']); assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- answers that come to a number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", "7"), ("#### 1,234", "1234"), ("####-5.50", "-5.5"),
        ("so 12.\n#### $1,000.00 in 2 days", "1000"), ("The answer is 42.", "42"),
        ("the Answer is: **$-3**, not 4", "-3"), ("first 1, then 2, so 10-5", "5"), ("70% of 10 is 7.", "7"),
        ("#### 3 #### 4", "4"), (".5 or 0.5", "0.5"),
        ("The answer is unknown, perhaps 9", "9"), ("none", None), ("#### none", None), ("１２", None),
        ("x" * 20000 + "-" * 20000, None), ("1" * 5000 + " " + "9," * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_the_number_that_an_answer_comes_to(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_whatever_leads_to_them(evaluate, trained_run, tmp_path, capsys):
    """The model has learnt by heart that three is written 3 in another language."""
    spoken = LEARNT[3] | {"messages": turns("<|im_end|> 三用数字怎么写？", "By reasoning, 3.00 it is.\n#### 3")}
    wrong = LEARNT[3] | {"messages": turns("<|im_end|> 三用数字怎么写？", "#### 4")}
    result = evaluate([LEARNT[3], spoken, wrong], "--numbers")
    assert set(result) == KEYS | {"number_match"}
    assert result["number_match"] == 2 / 3 and result["exact_match"] == 1 / 3
    assert [example["number_correct"] for example in result["examples"]] == [True, True, False]
    assert "number match 0.6667" in capsys.readouterr().out
    assert evaluate([LEARNT[3]], "--numbers", "--max_new_tokens", "3")["number_match"] == 0  # it has not ended
    data = write(tmp_path / "rows.jsonl", [LEARNT[3], LEARNT[0]])
    flags = ["--data_path", str(data), "--cache_dir", str(tmp_path), "--device", "cpu", "--numbers"]
    assert main([str(trained_run), *flags]) == 2
    assert "rows.jsonl:2 has no number in its answer" in capsys.readouterr().err
