"""MiniMind's labels against ours on MiniMind's own tokenizer and template, row for row.

Its data set class runs from a checkout. Where it throws dice (a system prompt now and then, an empty think block taken
out) they are loaded so that the row stays what the template makes of it.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

from dataset.chat import ChatRenderer
from dataset.formats import Fields
from dataset.reader import parse_conversation
from scripts.templates.shapes import Row, answer, shapes, user

LENGTH = 8192
ROWS = 2000  # of each kind of data, at most
STAYS = 0.2  # the throw at which MiniMind neither adds a system prompt nor takes out a think block
END = "same, but MiniMind also trains the line feed after the end of a turn"


def rows(data: Path) -> Iterator[tuple[str, Row]]:
    """Rows of MiniMind's form, each with its kind."""
    for name, row in shapes([], "").items():
        if "spelled" not in name and "train:" not in name:  # its texts can forge tokens, and it trains every turn
            yield "shapes", as_minimind(row["messages"], row.get("tools"))
    questions = list(_first_rows(data / "gsm8k" / "test.jsonl"))
    for at, row in enumerate(questions):
        yield "GSM8K", as_minimind([user(row["question"]), answer(row["answer"])])
        steps, short = row["answer"].rsplit("\n", 1)
        yield "GSM8K with reasoning", as_minimind([user(row["question"]), answer(short, reasoning_content=steps)])
        inline = answer(f"<think>\n{steps}\n</think>\n\n{short}")
        yield "GSM8K with reasoning inline", as_minimind([user(row["question"]), inline])
        turns = [m for other in questions[at : at + 3] for m in (user(other["question"]), answer(other["answer"]))]
        turns[1]["reasoning_content"] = steps
        yield "three turns, the first with reasoning", as_minimind(turns)
    for row in _first_rows(data / "sgd" / "dev.jsonl"):
        yield "tool dialogues", as_minimind(row["messages"], row.get("tools"))
        thought = [
            m | {"reasoning_content": "This needs a tool"} if m.get("tool_calls") else m for m in row["messages"]
        ]
        yield "tool dialogues with reasoning", as_minimind(thought, row.get("tools"))


def _first_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, islice(lines, ROWS))


def as_minimind(messages: list[Row], tools: Any = None) -> Row:
    """A row as MiniMind's data has them: calls and tools as JSON in strings, the tools in the system message."""
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    turns = []
    for message in messages:
        turn = {key: message[key] for key in ("role", "content", "reasoning_content") if message.get(key) is not None}
        if message.get("tool_calls"):
            turn["tool_calls"] = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
        turns.append(turn)
    if tools:
        turns[0]["tools"] = json.dumps(tools, ensure_ascii=False)
    return {"conversations": turns}


def their_labels(directory: Path, tokenizer: Any, made: list[Row]) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids and mask of each row by MiniMind's SFTDataset."""
    spec = importlib.util.spec_from_file_location("minimind_dataset", directory / "dataset" / "lm_dataset.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = SimpleNamespace(random=lambda: STAYS, choice=lambda options: options[0])
    with tempfile.TemporaryDirectory(prefix="minimind-") as work:
        path = Path(work) / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
        dataset = module.SFTDataset(str(path), tokenizer, max_length=LENGTH)
        for at in range(len(dataset)):
            ids, labels = (part.tolist() for part in dataset[at])
            length = max((n + 1 for n, number in enumerate(ids) if number != tokenizer.pad_token_id), default=0)
            yield ids[:length], [label != -100 for label in labels[:length]]


def difference(ours: Any, ids: list[int], labels: list[bool], line_feed: list[int], end: int) -> str:
    """What a row of ours has otherwise; "" for nothing. `ours` is a list of samples or an error."""
    if isinstance(ours, Exception):
        return f"refused: {getattr(ours, 'code', type(ours).__name__)}"
    if len(ours) != 1:
        return f"{len(ours)} samples of one row"
    mine, mask = ours[0].ids.tolist(), ours[0].supervised.tolist()
    if mine != ids[: len(mine)]:
        return "other ids"
    beyond = [
        flag for number, flag in zip(ids[len(mine) :], labels[len(mine) :], strict=True) if number not in line_feed
    ]
    if any(beyond):
        return "ends too early"
    if mask == labels[: len(mine)]:
        return "" if not any(labels[len(mine) :]) else END
    after_end = [at for at in range(1, len(mine)) if mine[at] in line_feed and mine[at - 1] == end]
    same = [flag if at not in after_end else mask[at] for at, flag in enumerate(labels[: len(mine)])]
    return END if mask == same else "another mask"


def compare(directory: Path, data: Path) -> dict[str, Counter[str]]:
    """For each kind of row how many are the same, and how the others differ."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory / "model")
    renderer = ChatRenderer(tokenizer)
    made = list(rows(data))
    line_feed, end = tokenizer("\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    found: dict[str, Counter[str]] = {}
    theirs = their_labels(directory, tokenizer, [row for _, row in made])
    for (kind, row), (ids, labels) in zip(made, theirs, strict=True):
        conversation = parse_conversation(1, row, "conversations", Fields())
        (ours,) = renderer.render_batch([conversation])
        found.setdefault(kind, Counter())[difference(ours, ids, labels, line_feed, end) or "same"] += 1
    return found
