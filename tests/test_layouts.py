"""One golden row of every layout: the conversation that it means, written out by hand."""

import json

import pytest

from dataset.errors import Defect
from dataset.formats import LAYOUTS, Fields
from dataset.prepare import DataOptions, prepare
from dataset.reader import Conversation, detect_layout, read_conversations
from tests.test_chat import CALL as CALL_START
from tests.test_chat import END, byte_tokenizer
from tests.test_chat import UNCALL as CALL_END

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Köln"}}}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def says(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


GOLDEN = {
    "messages": (
        {"messages": [says("user", "a"), says("assistant", "b", weight=0), says("user", "c"), says("assistant", "d")]},
        Conversation(
            1,
            [says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")],
            wishes={1: False},
        ),
    ),
    "conversations": (
        {
            "conversations": [
                says("system", "s", tools=json.dumps(TOOLS)),
                says("user", "a"),
                says("assistant", "", reasoning_content="r", tool_calls=json.dumps([CALL["function"]])),
                says("tool", "t"),
                says("assistant", "b", train=True),
            ]
        },
        Conversation(
            1,
            [
                says("system", "s"),
                says("user", "a"),
                says("assistant", "", reasoning_content="r", tool_calls=[CALL]),
                says("tool", "t"),
                says("assistant", "b"),
            ],
            TOOLS,
            wishes={4: True},
        ),
    ),
    "sharegpt": (
        {
            "system": "s",
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "t"},
                {"from": "gpt", "value": "b"},
            ],
        },
        Conversation(
            1,
            [
                says("system", "s"),
                says("user", "a"),
                says("assistant", "", tool_calls=[CALL]),
                says("tool", "t"),
                says("assistant", "b"),
            ],
            TOOLS,
        ),
    ),
    "alpaca": (
        {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["x", "y"]]},
        Conversation(
            1,
            [
                says("system", "s"),
                says("user", "x"),
                says("assistant", "y"),
                says("user", "a\ni"),
                says("assistant", "b"),
            ],
        ),
    ),
    "prompt": (
        {"prompt": "a", "completion": "b"},
        Conversation(1, [says("user", "a"), says("assistant", "b")]),
    ),
    "dolly": (
        {"instruction": "a", "context": "c", "response": "b", "system": "s"},
        Conversation(1, [says("system", "s"), says("user", "a\nc"), says("assistant", "b")]),
    ),
    "xlam": (
        {"query": "a", "tools": json.dumps(TOOLS), "answers": json.dumps([CALL["function"]])},
        Conversation(1, [says("user", "a"), says("assistant", "", tool_calls=[CALL])], TOOLS),
    ),
    "ultrachat": (
        {"data": ["a", "b", "c", "d"]},
        Conversation(1, [says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")]),
    ),
    "text": ({"text": " a b "}, Conversation(1, [], text=" a b ")),
}


def write(tmp_path, *rows: dict) -> object:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", GOLDEN)
def test_a_layout_is_found_and_means_this_conversation(tmp_path, name):
    row, expected = GOLDEN[name]
    path = write(tmp_path, row)
    assert detect_layout(path, Fields()) == name
    assert list(read_conversations(path, Fields())) == [expected]


def test_every_layout_has_a_golden_row():
    assert {*GOLDEN, "fields"} == set(LAYOUTS) == set(SUPERVISED)


LOOK = [CALL_START, *'{"name": "look", "arguments": {"city": "Köln"}}'.encode(), CALL_END, END]
SUPERVISED = {
    "messages": [*b"d", END],
    "conversations": [*LOOK, *b"b", END],
    "sharegpt": [*LOOK, *b"b", END],
    "alpaca": [*b"y", END, *b"b", END],
    "prompt": [*b"b", END],
    "text": [*b"a b ", END],  # the first token of a text has nothing before it that could predict it
    "dolly": [*b"b", END],
    "xlam": LOOK,
    "ultrachat": [*b"b", END, *b"d", END],
    "fields": [*b"b", END],
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_exactly_these_ids_are_supervised(tmp_path, name):
    """Bytes are their own ids under this tokenizer, and control tokens follow from 256 on."""
    path = write(tmp_path, GOLDEN[name][0] if name in GOLDEN else {"q": "a", "answer": "b"})
    options = DataOptions("q", "answer") if name == "fields" else DataOptions(vanished="warn")  # a plain template
    store = prepare(path, byte_tokenizer(), options, tmp_path / "cache", echo=lambda _: None)
    ids, supervised = store.tokens(0)
    assert store.report["layout"] == name and store.num_samples == 1
    assert ids[1:][supervised[1:]].tolist() == SUPERVISED[name]
    assert store.targets.tolist() == [len(SUPERVISED[name])]


def test_prompt_and_completion_may_be_messages_of_which_only_the_completion_is_trained(tmp_path):
    row = {
        "prompt": [says("user", "a"), says("assistant", "b"), says("user", "c")],
        "completion": [says("assistant", "d")],
    }
    (conversation,) = read_conversations(write(tmp_path, row), Fields())
    assert [message["content"] for message in conversation.messages] == ["a", "b", "c", "d"]
    assert conversation.wishes == {0: False, 1: False, 2: False}


def test_a_named_layout_is_taken_whatever_the_rows_look_like(tmp_path):
    row = {"text": "whole", "messages": [says("user", "a"), says("assistant", "b")]}
    path = write(tmp_path, row)
    assert detect_layout(path, Fields()) == "messages"
    (conversation,) = read_conversations(path, Fields(), "text")
    assert conversation.text == "whole"


def test_instructions_and_tools_beside_the_messages_are_read_in_every_layout(tmp_path):
    turns = [says("user", "a"), says("assistant", "b")]
    speakers = [{"from": "human", "value": "a", "tools": TOOLS}, {"from": "gpt", "value": "b"}]
    rows = [
        {"messages": turns, "system": "s", "tools": TOOLS},
        {"messages": [says("user", "a", tools=TOOLS), turns[1]], "system": "s"},
        {"conversations": turns, "system": "s", "tools": TOOLS},
        {"prompt": "a", "completion": "b", "system": "s", "tools": TOOLS},
        {"prompt": turns[:1], "completion": turns[1:], "system": "s", "tools": TOOLS},
        {"instruction": "a", "output": "b", "system": "s", "tools": TOOLS},
        {"conversations": speakers, "system": "s"},
    ]
    for row in rows:
        for name in {"system", "system_prompt"} if "system" in row else set():
            (found,) = read_conversations(write(tmp_path, {**row, "system": None, name: "s"}), Fields())
            assert (found.messages, found.tools) == ([says("system", "s"), *turns], TOOLS), row
            assert found.notes == ()


def test_a_system_text_that_stands_twice_is_read_once(tmp_path):
    turns = [says("system", "s"), says("user", "a"), says("assistant", "b")]
    for beside in ({"system": "s"}, {"system_prompt": "s"}, {"system": "s", "system_prompt": "s"}, {"system": " "}):
        (found,) = read_conversations(write(tmp_path, {"messages": turns, **beside}), Fields())
        assert found.messages == turns


def test_reasoning_has_three_names(tmp_path):
    for row in (
        {"messages": [says("user", "a", thinking=None), says("assistant", "b", thinking="r")]},
        {"messages": [says("user", "a"), says("assistant", "b", thinking="r", reasoning="r", reasoning_content="")]},
        {"conversations": [SHAREGPT_TURN, {"from": "gpt", "value": "b", "thinking": "r"}]},
        {"messages": [says("user", "a"), says("assistant", "b", reasoning="r")]},
        {"messages": [says("user", "a"), says("assistant", "b", reasoning_content="r")]},
        {"conversations": [SHAREGPT_TURN, {"from": "gpt", "value": "b", "reasoning_content": "r"}]},
    ):
        (found,) = read_conversations(write(tmp_path, row), Fields())
        assert found.messages[1] == says("assistant", "b", reasoning_content="r") and found.notes == ()


def test_what_a_table_holds_and_json_could_not_say_is_refused(tmp_path):
    from pyarrow import Table, parquet

    for value, code in ((float("nan"), "NON_FINITE"), (b"\xff", "BAD_TYPE")):
        tools = [{"name": "look", "x": value}]
        rows = [{"messages": [says("user", "a"), says("assistant", "b")], "tools": tools}]
        parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
        (found,) = read_conversations(tmp_path / "rows.parquet", Fields())
        assert isinstance(found, Defect) and found.code == code


SHAREGPT_TURN = {"from": "human", "value": "a"}


@pytest.mark.parametrize(
    ("layout", "row", "code"),
    [
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "alien", "value": "b"}]}, "UNKNOWN_ROLE"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "gpt"}]}, "MISSING_FIELD"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "gpt", "value": None}]}, "BAD_TYPE"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, "b"]}, "BAD_TYPE"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "gpt", "value": "b", "content": "c"}]}, "BAD_TYPE"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "gpt", "value": "b", "loss": 0.5}]}, "BAD_TYPE"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN], "chosen": {}, "rejected": {}}, "UNWANTED"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "function_call", "value": "{"}]}, "JSON_SYNTAX"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN, {"from": "function_call", "value": "7"}]}, "BAD_TYPE"),
        ("sharegpt", {"conversations": []}, "BAD_TYPE"),
        ("sharegpt", {"conversations": [SHAREGPT_TURN], "system": 7}, "BAD_TYPE"),
        ("alpaca", {"instruction": "a"}, "MISSING_FIELD"),
        ("alpaca", {"instruction": "a", "output": " "}, "EMPTY_ASSISTANT"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "BAD_TYPE"),
        ("alpaca", {"instruction": "a", "output": "b", "history": "x"}, "BAD_TYPE"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "BAD_TYPE"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x", None]]}, "BAD_TYPE"),
        ("prompt", {"prompt": "a"}, "MISSING_FIELD"),
        ("prompt", {"prompt": "a", "completion": [says("assistant", "b")]}, "BAD_TYPE"),
        ("prompt", {"prompt": [says("assistant", "x")], "completion": [says("assistant", "b")]}, "BAD_ORDER"),
        ("prompt", {"prompt": "a", "completion": "b", "label": False}, "UNWANTED"),
        ("alpaca", {"instruction": "a", "output": "b", "image": "a.png"}, "MEDIA"),
        ("text", {"text": "a", "images": ["a.png"]}, "MEDIA"),
        ("text", {"text": " \n"}, "EMPTY_TEXT"),
        ("text", {"text": None}, "BAD_TYPE"),
        ("text", {}, "MISSING_FIELD"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_bad_row_is_refused_by_code_and_line_and_alone(tmp_path, layout, row, code, place):
    rows = [GOLDEN[layout][0]] * 2
    rows.insert(place, row)
    found = list(read_conversations(write(tmp_path, *rows), Fields(), layout))
    assert [(item.line, item.code) for item in found if isinstance(item, Defect)] == [(place + 1, code)]
    assert len(found) == 3
