"""The embedded data is the same everywhere, its answers are right, and no held-out problem is ever trained."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from dataset import demo

ROOT = Path(__file__).resolve().parents[1]
TRAINING, HELD_OUT = demo.training_conversations(), demo.held_out_conversations()


def prompt(row: dict) -> str:
    return json.dumps(row["messages"][:-1], ensure_ascii=False)


def last_turns(rows: list[dict], family: str) -> list[tuple[str, str]]:
    return [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in rows if row["family"] == family]


def test_the_counts_are_exact_and_every_family_is_there():
    assert Counter(row["family"] for row in TRAINING) == demo.TRAINING_ROWS
    assert Counter(row["family"] for row in HELD_OUT) == dict.fromkeys(demo.FAMILIES, demo.HELD_OUT_ROWS)
    assert len(demo.FAMILIES) == 7


def test_roles_alternate_and_end_with_an_answer():
    for row in TRAINING + HELD_OUT:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
    assert {len(row["messages"]) for row in HELD_OUT} == {2, 4}


def test_the_seed_alone_decides():
    assert demo.training_conversations() == TRAINING and demo.held_out_conversations() == HELD_OUT
    assert demo.training_conversations(7) != TRAINING and demo.held_out_conversations(7) != HELD_OUT


def test_another_process_with_other_string_hashes_writes_the_same_files(tmp_path):
    written = demo.write_demo(tmp_path / "here")
    assert [path.name for path in written] == ["train.jsonl", "heldout.jsonl"]
    code = f"from dataset.demo import write_demo; write_demo({str(tmp_path / 'there')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "123"})
    for path in written:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    rows = [json.loads(line) for line in written[1].read_text(encoding="utf-8").splitlines()]
    assert rows == HELD_OUT


def test_no_held_out_prompt_is_trained():
    held_out = {prompt(row) for row in HELD_OUT}
    assert len(held_out) == len(HELD_OUT)
    assert held_out.isdisjoint(prompt(row) for row in TRAINING)
    assert held_out & {prompt(row) for row in demo.held_out_conversations()}  # the comparison does find equals


def drawn_keys(split: str, seed: int, count: int) -> set[str]:
    streams = {family: demo.problems(family, split, seed) for family in demo.FAMILIES}
    return {next(stream)[0] for stream in streams.values() for _ in range(count)}


def test_no_held_out_problem_is_trained_under_any_seed_or_in_any_family():
    """Keys name the operands, the set of words or the spelt word, so other wordings of a problem count as the same."""
    held_out = drawn_keys("held out", 42, 200) | drawn_keys("held out", 7, 200)
    trained = drawn_keys("training", 42, max(demo.TRAINING_ROWS.values())) | drawn_keys("training", 3, 500)
    assert held_out.isdisjoint(trained)
    assert drawn_keys("held out", 42, 200) & drawn_keys("held out", 7, 200)


def test_the_key_is_the_problem_and_not_its_wording():
    keys: dict[str, set[str]] = {}
    for key, turns in (demo.addition(Random(seed)) for seed in range(3000)):
        a, b = sorted(map(int, re.findall(r"\d+", turns[0])))
        assert key == f"sum {a} {b}"
        keys.setdefault(key, set()).add(turns[0])
    assert max(map(len, keys.values())) > 1


def test_a_tiny_family_stops_with_a_word(monkeypatch):
    monkeypatch.setitem(demo.FAMILIES, "addition", lambda rng: ("only one", ["question", "answer"]))
    monkeypatch.setattr(demo, "MAX_DRAWS", 50)
    with pytest.raises(AssertionError, match="addition has only"):
        demo.held_out_conversations()


def test_sums_are_right():
    for question, answer in last_turns(TRAINING + HELD_OUT, "addition"):
        a, b = map(int, re.findall(r"\d+", question))
        *steps, total = answer.removesuffix(".").split(", ")
        assert total == f"so {a + b}"
        for step in steps:
            terms, value = step.split("=")
            assert sum(map(int, terms.split("+"))) == int(value)


def test_numbers_are_compared():
    for question, answer in last_turns(TRAINING + HELD_OUT, "ordering"):
        a, b = map(int, re.findall(r"\d+", question))
        word, chosen = ("larger", max(a, b)) if "larger" in question else ("smaller", min(a, b))
        assert answer == f"{chosen} is {word} than {a + b - chosen}." and a // 10 != b // 10


def test_letters_are_reversed_and_counted():
    for question, answer in last_turns(TRAINING + HELD_OUT, "backwards"):
        assert answer.split() == question.split(": ")[1].split()[::-1]
    for question, answer in last_turns(TRAINING + HELD_OUT, "counting"):
        letters = question.split(": ")[1].split()
        steps = " ".join(f"{letter}{number}" for number, letter in enumerate(letters, 1))
        assert answer == f"{steps}, so {len(letters)} letters."


def test_units_are_converted():
    for question, answer in last_turns(TRAINING + HELD_OUT, "units"):
        n, factor, product = map(int, re.findall(r"\d+", answer))
        assert n * factor == product and f"{n} " in question and answer.split(" ", 1)[1].removesuffix(".") in question


def test_the_second_question_needs_what_was_said_before():
    rows = [row for row in TRAINING + HELD_OUT if row["family"] == "memory"]
    for row in rows:
        told, _, question, answer = (message["content"] for message in row["messages"])
        fact = answer.removesuffix(".").rsplit(" ", 1)[1]
        assert fact in told and fact not in question
    assert {len(row["messages"]) for row in rows} == {4}


def test_chinese_numerals():
    numbers = [7, 10, 14, 20, 47, 100, 110, 305, 999]
    expected = ["七", "十", "十四", "二十", "四十七", "一百", "一百一十", "三百零五", "九百九十九"]
    assert list(map(demo.chinese_numeral, numbers)) == expected


def test_one_family_is_chinese():
    assert all(re.search("[一-鿿]", question) for question, _ in last_turns(HELD_OUT, "chinese"))
    assert not any(re.search("[一-鿿]", prompt(row)) for row in HELD_OUT if row["family"] != "chinese")


def test_held_out_is_a_matter_of_the_key():
    share = sum(demo.is_held_out(f"sum {a} {b}") for a in range(100) for b in range(100)) / 10_000
    assert 0.14 < share < 0.2
    assert demo.is_held_out("x") == (hashlib.sha256(b"x").digest()[0] < 43)
