"""The shipped tokenizer reads densely, other runtimes can rebuild it, and its chat template never takes text back."""

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from scripts.train_tokenizer import main as train_tokenizer
from tests.small_world import SHARED

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "model" / "tokenizer"
NAMED_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@cache
def fast() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@cache
def saved() -> dict[str, Any]:
    return json.loads((DIRECTORY / "tokenizer.json").read_text(encoding="utf-8"))


def shared_lines(name: str) -> list[str]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path.read_text(encoding="utf-8").splitlines()


def characters_per_token(texts: list[str]) -> float:
    return sum(map(len, texts)) / sum(len(encoding.ids) for encoding in fast().encode_batch(texts))


def entries_with_digits(subject: Tokenizer) -> list[str]:
    """ASCII digits only: other bytes are written as characters that may look like digits."""
    return sorted(entry for entry in subject.get_vocab() if not set("0123456789").isdisjoint(entry))


def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer().apply_chat_template(messages, tokenize=False, **options)


def assert_prefix_stable(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> None:
    before = ""
    for count, message in enumerate(messages, 1):
        if message["role"] == "assistant" and count > 1:
            prompt = rendered(messages[: count - 1], tools=tools, add_generation_prompt=True)
            assert prompt.startswith(before)
            before = prompt
        after = rendered(messages[:count], tools=tools)
        assert after.startswith(before), f"message {count} changed what stood before it"
        before = after


def test_the_vocabulary_has_6400_entries_with_the_named_tokens_first():
    assert len(tokenizer()) == fast().get_vocab_size() == 6400
    assert sorted(fast().get_vocab().values()) == list(range(6400))
    assert [fast().token_to_id(token) for token in NAMED_TOKENS] == list(range(9))
    assert [fast().encode(token).ids for token in NAMED_TOKENS] == [[i] for i in range(9)]
    assert (tokenizer().pad_token_id, tokenizer().eos_token_id, tokenizer().bos_token_id) == (0, 2, None)


def test_a_decoded_answer_keeps_its_tool_call_and_loses_the_end_of_turn():
    ids = tokenizer()("<think>hm</think><tool_call>{}</tool_call><|im_end|>")["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=True) == "<think>hm</think><tool_call>{}</tool_call>"


def test_other_runtimes_can_rebuild_it():
    """Byte-level BPE with the plain split is what llama.cpp calls "gpt-2"; nothing else may touch the text."""
    pre_tokenizer = saved()["pre_tokenizer"]
    assert (pre_tokenizer["type"], pre_tokenizer["add_prefix_space"]) == ("ByteLevel", False)
    assert pre_tokenizer["use_regex"]
    assert saved()["normalizer"] is None and saved()["post_processor"] is None
    assert saved()["decoder"]["type"] == "ByteLevel"
    assert saved()["model"]["type"] == "BPE" and not saved()["model"]["byte_fallback"]
    config = json.loads((DIRECTORY / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False


def test_every_byte_has_a_token_and_every_merge_ends_in_one():
    vocabulary, merges = saved()["model"]["vocab"], saved()["model"]["merges"]
    assert len(merges) == 6400 - 9 - 256
    assert all(left + right in vocabulary for left, right in merges)


def test_digits_are_never_merged():
    assert entries_with_digits(fast()) == list("0123456789")
    assert fast().encode("in 2026: 48+7").tokens == ["in", "Ġ", "2", "0", "2", "6", ":", "Ġ", "4", "8", "+", "7"]


def test_any_text_comes_back_unchanged():
    rng = random.Random(1)
    draws = [[chr(rng.randrange(1, 0xD800)) for _ in range(50)] for _ in range(40)]
    draws += [[chr(rng.randrange(0xE000, 0x110000)) for _ in range(50)] for _ in range(10)]
    texts = [
        "",
        " ",
        "  a  b ",
        "\n\n\t x\r\n",
        "don't DON'T",
        "é é 😀 👩‍🔬 \u200b",
        "中文，测试。１２",
        "\x00\x7f",
        " ,  .",
    ]
    for text in texts + ["".join(draw) for draw in draws]:
        assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_it_reads_grade_school_maths_densely():
    rows = [json.loads(line) for line in shared_lines("gsm8k/test.jsonl")]
    assert characters_per_token([row["question"] + row["answer"] for row in rows]) >= 2.5


def test_it_reads_chinese_densely():
    assert characters_per_token(shared_lines("text/zh.txt")) >= 1.8


def test_a_plain_chat_renders_literally_and_nothing_is_stripped():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " hi \n"},
        {"role": "assistant", "content": "  hello"},
    ]
    assert rendered(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n hi \n<|im_end|>\n"
        "<|im_start|>assistant\n  hello<|im_end|>\n"
    )
    assert rendered(messages[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\n hi \n<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("arguments", [{"city": "Köln", "a": 1}, '{"city": "Köln", "a": 1}'], ids=["object", "string"])
def test_a_tool_dialogue_renders_literally(arguments):
    function = {"name": "weather", "arguments": arguments}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Look it up.",
            "tool_calls": [{"function": function}],
        },
        {"role": "tool", "name": "weather", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "Once more.", "tool_calls": [function, {"name": "now", "arguments": {}}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    assert rendered(messages, tools=[WEATHER]) == (
        "<|im_start|>system\nBe brief.\n\nYou can call these tools, each given as JSON:\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}\n'
        'Write a call as\n<tool_call>\n{"name": "TOOL", "arguments": {"NAME": "VALUE"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nLook it up.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "a": 1}}\n</tool_call><|im_end|>\n'
        '<|im_start|>tool\n<tool_response>\n{"sky": "grey"}\n</tool_response><|im_end|>\n'
        '<|im_start|>assistant\nOnce more.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "a": 1}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n1\n</tool_response><|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )
    assert_prefix_stable(messages, [WEATHER])


def test_tools_without_a_system_message_get_a_block_of_their_own():
    text = rendered([{"role": "user", "content": "hi"}], tools=[WEATHER])
    assert text.startswith("<|im_start|>system\nYou can call")
    assert text.count("<|im_start|>") == 2


def test_the_template_has_no_generation_tags():
    assert "generation %}" not in (DIRECTORY / "chat_template.jinja").read_text(encoding="utf-8")


def test_real_tool_dialogues_are_prefix_stable():
    for line in shared_lines("sgd/dev.jsonl"):
        row = json.loads(line)
        assert_prefix_stable(row["messages"], row["tools"])


def test_the_prefix_check_sees_a_template_that_takes_text_back(monkeypatch):
    monkeypatch.setattr(tokenizer(), "chat_template", "{{ messages[-1].content }}")
    with pytest.raises(AssertionError, match="message 2 changed"):
        assert_prefix_stable([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_training_again_gives_the_same_bytes(tmp_path):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("one two three 123\n一二三\n" * 20, encoding="utf-8")
    rows.write_text(json.dumps({"question": "hello hello", "messages": [{"content": "world world"}]}) + "\n")
    outputs = []
    for name in ("a", "b"):
        train_tokenizer(["--text", str(text), str(rows), "--out", str(tmp_path / name), "--vocab_size", "600"])
        outputs.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert outputs[0] == outputs[1]
    trained = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert trained.get_vocab_size() == 600
    assert [trained.token_to_id(token) for token in NAMED_TOKENS] == list(range(9))
    assert entries_with_digits(trained) == list("0123456789")


def test_any_data_of_the_trainer_gives_the_same_tokenizer_ready_for_chat(tmp_path):
    from pyarrow import Table, parquet

    rows = [{"question": "hello hello", "answer": "world world"}] * 5
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    outputs = set()
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "*.parquet"):
        out = tmp_path / f"of {name[-4:]}"
        assert train_tokenizer(["--text", str(tmp_path / name), "--out", str(out), "--vocab_size", "500"]) == 0
        outputs.add((out / "tokenizer.json").read_bytes())
    assert len(outputs) == 1
    chat = [{"role": "user", "content": "hello"}]
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer().apply_chat_template(chat, tokenize=False)


def test_what_cannot_be_trained_on_is_an_error(tmp_path, capsys):
    assert train_tokenizer(["--out", str(tmp_path), "--vocab_size", "60000"]) == 2
    assert "--vocab_size 60000: the text yields only" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{\n')
    assert train_tokenizer(["--out", str(tmp_path), "--text", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl:2: JSON_SYNTAX" in capsys.readouterr().err
    assert train_tokenizer(["--out", str(tmp_path), "--text", str(tmp_path / "none.txt")]) == 74
