"""Labels against ours, row for row: on a small checkout that is made here in the manner of MiniMind's."""

import json

import numpy as np
import pytest

from dataset.chat import Sample
from dataset.errors import RowError
from scripts.templates.families import byte_tokenizer
from scripts.templates.minimind import END, difference
from scripts.templates.shapes import WEATHER, answer, call, calls, result, user
from scripts.templates.table import main

# A think block in every answer, the prompt ends with an empty one, and the message on tools is the system's.
TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '') }}
{%- for tool in tools or [] %}{{ '\n<tools>' + tool | tojson + '</tools>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
{%- if message.role == 'assistant' %}
{%- set parts = message.content.split('</think>') %}
{%- set thought = message.reasoning_content or parts[0].replace('<think>', '') if parts | length > 1
    or message.reasoning_content is string else '' %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + parts[-1].lstrip('\n') }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '<tool_call>' + function.name + function.arguments | tojson + '</tool_call>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}{{ '<tool_response>' + message.content + '</tool_response>' }}
{%- else %}{{ message.content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"""

DATASET = """\
import json
import random

import torch

HEADER, END = "<|im_start|>assistant\\n", "<|im_end|>\\n"


class SFTDataset:
    def __init__(self, path, tokenizer, max_length):
        with open(path, encoding="utf-8") as lines:
            self.rows = [json.loads(line) for line in lines]
        self.tokenizer, self.max_length = tokenizer, max_length

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        turns = self.rows[at]["conversations"]
        tools = json.loads(turns[0].get("tools", "null"))
        turns = [t | {"tool_calls": json.loads(t["tool_calls"])} if "tool_calls" in t else t for t in turns]
        text = self.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
        if "</think>" in text and random.random() > 0.2:
            text = text.replace("<think>", "")
        ids, labels = [], []
        for number, turn in enumerate(text.split(HEADER)):
            said, end, rest = turn.partition(END) if number else ("", "", turn)
            for part, flag in (HEADER if number else "", False), (said + end, TRAINED), (rest, False):
                found = self.tokenizer(part, add_special_tokens=False)["input_ids"]
                ids, labels = ids + found, labels + [n if flag else -100 for n in found]
        fill = self.max_length - len(ids)
        ids, labels = ids + fill * [self.tokenizer.pad_token_id], labels + fill * [-100]
        return torch.tensor(ids), torch.tensor(labels)
"""


@pytest.fixture
def checkout(tmp_path):
    """A directory with tokenizer and data set class, and data beside it."""
    tokenizer = byte_tokenizer("qwen", TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "lm_dataset.py").write_text(DATASET.replace("TRAINED", "True"))
    for name, rows in {
        "gsm8k/test": [{"question": f"How much is {n} + {n}?", "answer": f"Add them\n#### {2 * n}"} for n in range(4)],
        "sgd/dev": [
            {
                "messages": [
                    *(user("Will it rain"), calls(call(1, "forecast", town="Lisbon"), content="A moment")),
                    *(result(1, "no"), answer("It stays dry")),
                ],
                "tools": [WEATHER],
            }
        ],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_labels_of_a_checkout_are_compared_row_for_row(checkout, capsys):
    arguments = ["--minimind", str(checkout), "--data", str(checkout)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.endswith(f" {END}") for line in lines), lines
    assert lines[-1] == f"tool dialogues with reasoning: 1 {END}"

    path = checkout / "dataset" / "lm_dataset.py"
    path.write_text(DATASET.replace("TRAINED", '"tool_call" not in said'))
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "tool dialogues: 1 another mask" in lines and f"GSM8K: 4 {END}" in lines


def test_a_checkout_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["--minimind", str(tmp_path / "nowhere"), "--data", str(tmp_path)]) == 2
    assert "nowhere" in capsys.readouterr().err


LINE_FEED, STOP = 10, 2
OURS = [5, 6, STOP, LINE_FEED, 7, 8, STOP]
TRAINED = [False, True, True, False, False, True, True]
CASES = {
    "": (OURS, TRAINED),
    END: ([*OURS, LINE_FEED], [*TRAINED, True]),
    "other ids": ([5, 9, *OURS[2:]], TRAINED),
    "ends too early": ([*OURS, 9], [*TRAINED, True]),
    "another mask": (OURS, [True, *TRAINED[1:]]),
}


def sample(ids=OURS, mask=TRAINED):
    return Sample(np.array(ids), np.array(mask))


@pytest.mark.parametrize("expected", CASES)
def test_each_kind_of_difference_has_its_name(expected):
    ids, labels = CASES[expected]
    assert difference([sample()], ids, labels, [LINE_FEED], STOP) == expected


def test_a_line_feed_is_forgiven_only_after_the_end_of_a_turn():
    after_end = [*TRAINED[:3], True, *TRAINED[4:]]
    assert difference([sample()], OURS, after_end, [LINE_FEED], STOP) == END
    elsewhere = [5, 6, LINE_FEED, 7]
    ours = [sample(elsewhere, [False, True, False, True])]
    assert difference(ours, elsewhere, [False, True, True, True], [LINE_FEED], STOP) == "another mask"
    missing = [sample(mask=[*TRAINED[:-1], False])]
    assert difference(missing, OURS, TRAINED, [LINE_FEED], STOP) == "another mask"


def test_refused_rows_and_rows_of_several_samples_are_differences():
    assert difference(RowError("VANISHED", "gone"), OURS, TRAINED, [LINE_FEED], STOP) == "refused: VANISHED"
    assert difference([sample(), sample()], OURS, TRAINED, [LINE_FEED], STOP) == "2 samples of one row"
