"""Any number of processes gives the same samples in the same order, and a dead one is noticed."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dataset.chat import ChatRenderer
from dataset.encode import Tokeniser, in_blocks, map_in_order
from dataset.formats import Fields
from dataset.prepare import DataOptions, prepare
from dataset.raw_rows import read_raw_rows
from dataset.reader import Conversation
from dataset.system_prompts import SystemPrompts
from model.build import OWN_TOKENIZER, load_tokenizer
from tests.small_world import write_rows


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(OWN_TOKENIZER))


def test_the_store_does_not_depend_on_the_processes(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", 700)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:300], "{", *lines[300:], "[]"]) + "\n")
    options = DataOptions(bad_rows="skip")
    stores = [
        prepare(path, tokenizer, options, tmp_path / str(count), echo=lambda _: None, processes=count)
        for count in (1, 2, 3)
    ]
    assert len({store.fingerprint for store in stores}) == 1
    assert [store.where(300) for store in stores] == [f"{path}:302"] * 3
    assert all(store.report == stores[0].report for store in stores)
    assert stores[0].report["rejected_by_code"] == {"JSON_SYNTAX": 1, "NOT_OBJECT": 1}


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 else 0)
    return os.getpid(), number**2


def test_results_come_in_order_from_several_processes():
    found = list(map_in_order(slow_square, iter(range(40)), 2))
    assert [square for _, square in found] == [number**2 for number in range(40)]
    workers = {process for process, _ in found}
    assert len(workers) == 2 and os.getpid() not in workers


def test_one_item_needs_no_process():
    assert list(map_in_order(slow_square, iter([3]), 4)) == [(os.getpid(), 9)]
    assert list(map_in_order(slow_square, iter([]), 4)) == []


def test_items_are_read_only_as_fast_as_they_are_worked_on():
    taken = []
    results = map_in_order(slow_square, (taken.append(number) or number for number in range(1000)), 2)
    next(results)
    assert len(taken) < 20
    results.close()


def die(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_an_error_and_not_a_hang():
    with pytest.raises(ChildProcessError, match="was killed: by a chat template that does not end"):
        list(map_in_order(die, iter(range(20)), 2))


def test_a_bug_in_a_process_arrives_as_it_is():
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda number: 1 // (number - 3), iter(range(20)), 2))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    pid = os.fork()
    if pid == 0:
        for process, _ in map_in_order(slow_square, iter(range(100_000)), 2):
            (tmp_path / str(process)).touch()
    deadline = time.monotonic() + 30
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(workers) == 2
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """A process that has ended but waits for its parent is not alive."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


PROMPTS = SystemPrompts(("Be brief.", "Be kind."), 0.25, 7)


def conversation(number: int, **more) -> Conversation:
    messages = [{"role": "user", "content": f"a {number}"}, {"role": "assistant", "content": "b"}]
    return Conversation(number, messages, **more)


def test_a_share_of_the_conversations_gets_a_system_prompt():
    added = [PROMPTS.add_to(conversation(number, wishes={1: True})) for number in range(4000)]
    texts = [each.messages[0]["content"] for each in added if each.messages[0]["role"] == "system"]
    assert 900 < len(texts) < 1100
    assert 400 < texts.count("Be kind.") < 600
    for each in added:
        ((turn, wish),) = each.wishes.items()
        assert wish and each.messages[turn]["content"] == "b"  # the wish stays with its message
    assert [PROMPTS.add_to(conversation(number, wishes={1: True})) for number in range(4000)] == added
    other = SystemPrompts(PROMPTS.texts, 0.25, 8)
    assert [other.add_to(conversation(number, wishes={1: True})) for number in range(4000)] != added


def test_rows_that_say_the_same_get_the_same_prompt():
    for number in range(100):
        first = PROMPTS.add_to(conversation(number))
        assert PROMPTS.add_to(replace(conversation(number), line=number + 500)).messages == first.messages


def test_conversations_that_have_instructions_keep_them():
    always = SystemPrompts(("Be brief.",), 1.0, 7)
    own = Conversation(1, [{"role": "system", "content": "x"}, *conversation(1).messages])
    for unchanged in (own, conversation(1, tools=[{"name": "look"}]), Conversation(1, [], text="plain")):
        assert always.add_to(unchanged) is unchanged
    assert always.add_to(conversation(1)).messages[0] == {"role": "system", "content": "Be brief."}


def test_system_prompts_are_one_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Be brief.\n\n  你好 \n", encoding="utf-8")
    assert SystemPrompts.from_file(str(path), 0.5, 1).texts == ("Be brief.", "你好")
    for content in (b"\n \n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="--system_prompts .*prompts.txt"):
            SystemPrompts.from_file(str(path), 0.5, 1)
    with pytest.raises(ValueError, match="cannot be read"):
        SystemPrompts.from_file(str(tmp_path / "none"), 0.5, 1)


def test_a_worker_gives_the_lines_of_its_block_in_order(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", 5)
    path.write_text(path.read_text() + "{\n")
    (block,) = in_blocks(read_raw_rows(path))
    prompts = SystemPrompts(("Be brief.",), 1.0, 7)
    outcomes = Tokeniser(ChatRenderer(tokenizer), "messages", Fields(), prompts)(block)
    assert [line for line, _ in outcomes] == [1, 2, 3, 4, 5, 6]
    assert "Be brief." in tokenizer.decode(outcomes[0][1][0].ids)
    assert outcomes[-1][1].code == "JSON_SYNTAX"
