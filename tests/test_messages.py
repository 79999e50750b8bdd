"""What other kits write into a message is read, refused or noted: nothing of it goes by in silence."""

import json

import pytest

from dataset.errors import RowError
from dataset.formats import MARKS, Fields
from dataset.reader import Conversation, parse_conversation

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Köln"}}}
TOOL_NOTE = "tool results follow answers whose call stands in their text"


def says(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def parse(*messages: object, fields: Fields = Fields(), layout: str = "messages", **row: object) -> Conversation:  # noqa: B008
    return parse_conversation(1, {"messages": list(messages), **row} if messages else row, layout, fields)


def refusal(*messages: object, **row: object) -> str:
    with pytest.raises(RowError) as caught:
        parse(*messages, **row)
    return f"{caught.value.code} {caught.value}"


def as_sharegpt(message: dict) -> dict:
    names = {"user": "human", "assistant": "gpt"}
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"from": names[message["role"]], "value": message["content"], **more}


@pytest.mark.parametrize("no", [0, False, 0.0])
@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_all_kits_are_obeyed_in_every_layout(mark, no):
    yes = type(no)(1)
    if mark == "masked":
        no, yes = yes, no
    turns = [
        says("user", "a", **{mark: no}),
        says("assistant", "bad", **{mark: no}),
        says("user", "c", **{mark: None}),
        says("assistant", "good", **{mark: yes}),
    ]
    prompted = {"prompt": turns[:3], "completion": turns[3:]}
    for layout, row in (
        ("messages", {"messages": turns}),
        ("conversations", {"conversations": turns}),
        ("sharegpt", {"conversations": [as_sharegpt(turn) for turn in turns]}),
        ("prompt", prompted),
    ):
        found = parse(layout=layout, **row)
        assert {turn: found.wishes[turn] for turn in (0, 1, 3)} == {0: False, 1: False, 3: True}, layout
        assert found.messages == [says(turn["role"], turn["content"]) for turn in turns] and found.notes == ()


def test_a_message_of_a_prompt_is_trained_if_it_says_so():
    prompt = [says("user", "a"), says("assistant", "b", loss=True), says("user", "c")]
    found = parse(layout="prompt", prompt=prompt, completion=[says("assistant", "d")])
    assert found.wishes == {0: False, 1: True, 2: False}


def test_marks_that_agree_may_stand_together_and_others_are_refused():
    assert parse(says("user", "a"), says("assistant", "b", weight=0, loss=False, masked=True)).wishes == {1: False}
    said = refusal(says("user", "a"), says("assistant", "b", loss=True, masked=True))
    assert "contradict each other ('loss': true, 'masked': true)" in said
    said = refusal(says("user", "a"), says("assistant", "b", loss_weight=0.5))
    assert "'loss_weight' must be 0 or 1, false or true, found 0.5" in said
    said = refusal(says("user", "a", train_on_turn=True), says("assistant", "b"))
    assert "message 0 has the role 'user' and asks to be trained" in said and "--train_on all" in said


def test_what_is_not_read_is_noted_by_its_key():
    found = parse(
        says("user", "a", date="2026", user_id=None, tags=[]),
        says("assistant", "b", tool_calls=[{**CALL, "index": 0, "id": "1", "status": "done"}], name="x"),
        says("tool", [{"type": "text", "text": "7", "cache_control": {"type": "ephemeral"}}], tool_call_id="1"),
        says("assistant", "c", date="2027"),
        id=7,
        source="",
        topics=[None],
        meta={},
        score=0,
        tools=[],
    )
    assert found.notes == (
        "the field 'id' is not read",
        "the field 'score' is not read",
        "the field 'date' of messages is not read",
        "the field 'status' of tool calls is not read",
        "the field 'cache_control' of content parts is not read",
    )


@pytest.mark.parametrize(
    ("layout", "row", "unread"),
    [
        ("alpaca", {"instruction": "a", "input": "", "output": "b", "text": "whole"}, ["text"]),
        ("prompt", {"prompt": "a", "completion": "b", "label": True, "score": 1}, ["score"]),
        ("alpaca", {"instruction": "a", "output": "b", "label": 0}, ["label"]),
        ("alpaca", {"instruction": "a", "output": "b", "label": "no"}, ["label"]),
        ("text", {"text": "a", "label": False, "system": "s", "chat_template_kwargs": {"a": 1}},
         ["label", "system", "chat_template_kwargs"]),
        ("fields", {"q": "a", "r": "b", "context": "c", "label": True, "chat_template_kwargs": {"a": 1}}, ["context"]),
        ("messages", {"messages": [says("user", "a"), says("assistant", "b")], "chosen": "b", "rejected": "c"},
         ["chosen", "rejected"]),
    ],
)  # fmt: skip
def test_each_layout_knows_which_keys_of_a_row_it_reads(layout, row, unread):
    found = parse(layout=layout, fields=Fields("q", "r") if layout == "fields" else Fields(), **row)
    assert found.notes == tuple(f"the field {key!r} is not read" for key in unread)


def test_named_fields_mean_what_the_user_says():
    row = {"image": "a", "label": "b", "system_prompt": "s"}
    found = parse(layout="fields", fields=Fields("image", "label", "system_prompt"), **row)
    assert found.messages == [says("system", "s"), says("user", "a"), says("assistant", "b")] and found.notes == ()


def test_variables_for_the_template_come_with_the_conversation():
    turns = [says("user", "a"), says("assistant", "b")]
    for given in ({"enable_thinking": False, "effort": "low"}, '{"enable_thinking": false, "effort": "low"}'):
        found = parse(*turns, chat_template_kwargs=given)
        assert (found.variables, found.notes) == ({"enable_thinking": False, "effort": "low"}, ())
    for nothing in (None, {}, "", []):
        assert parse(*turns, chat_template_kwargs=nothing).variables == {}
    assert "sets 'tools', which the row itself or the tokenizer decides" in refusal(
        *turns, chat_template_kwargs={"tools": []}
    )
    assert refusal(*turns, chat_template_kwargs={"a": float("nan")}).startswith("NON_FINITE")


@pytest.mark.parametrize(
    ("written", "read", "note"),
    [
        ("", {}, "empty arguments of a tool call are read as {}"),
        (" \n", {}, "empty arguments of a tool call are read as {}"),
        (None, {}, "missing arguments of a tool call are read as {}"),
        ("null", {}, "missing arguments of a tool call are read as {}"),
        ("{}", {}, None),
        ({}, {}, None),
    ],
)
def test_a_call_without_arguments_has_empty_ones(written, read, note):
    calls = [{"function": {"name": "now", "arguments": written}}, {"name": "now", "arguments": written}]
    if written is None:
        calls.append({"function": {"name": "now"}})
    found = parse(says("user", "a"), says("assistant", None, tool_calls=calls))
    expected = {"type": "function", "function": {"name": "now", "arguments": read}}
    assert found.messages[1]["tool_calls"] == [expected] * len(calls)
    assert found.notes == ((note,) if note else ())


def test_arguments_under_another_name_are_not_taken_for_none():
    said = refusal(says("user", "a"), says("assistant", "", tool_calls=[{"name": "now", "parameters": {"a": 1}}]))
    assert said == "MISSING_FIELD message 1.tool_calls[0] has no 'arguments', but 'parameters': give them that name"


NULL, JSON = "a tool result that is null is read as an empty text", "a tool result that is no text is written as JSON"


@pytest.mark.parametrize(
    ("content", "read", "note"),
    [
        ("22", "22", None),
        (None, "", NULL),
        ({"temp": 22, "city": "Köln"}, '{"temp": 22, "city": "Köln"}', JSON),
        (["a", "b"], '["a", "b"]', JSON),
        ([{"id": 1}], '[{"id": 1}]', JSON),
        ([], "[]", JSON),
        (22.5, "22.5", JSON),
        (True, "true", JSON),
        ([{"type": "text", "text": "22"}], "22", None),
    ],
)
def test_a_tool_result_becomes_text(content, read, note):
    call = says("assistant", "", tool_calls=[CALL])
    found = parse(says("user", "a"), call, says("tool", content), says("assistant", "b"))
    assert found.messages[2] == says("tool", read)
    assert found.notes == ((note,) if note else ())
    calling = {"from": "function_call", "value": json.dumps(CALL["function"])}
    turns = [as_sharegpt(says("user", "a")), calling, {"from": "observation", "value": content}]
    assert parse(layout="sharegpt", conversations=turns).messages[2] == says("tool", read)


def test_a_tool_result_that_json_cannot_say_is_refused():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    for content, code in ((float("inf"), "NON_FINITE"), (b"\xff", "BAD_TYPE"), (nested, "JSON_SYNTAX")):
        assert refusal(says("user", "a"), says("assistant", "b"), says("tool", content)).startswith(code)


def test_content_in_parts_is_its_text():
    parts = [{"type": "text", "text": "one "}, "two ", {"type": "text", "value": "three", "image": None}]
    found = parse(says("user", parts), says("assistant", [{"type": "text", "text": "b"}]))
    assert [message["content"] for message in found.messages] == ["one two three", "b"]
    assert found.notes == ("content in several parts is read as their text, one after the other",)
    assert parse(says("user", parts[:1]), says("assistant", ["b"])).notes == ()
    assert "content[0] of message 0 is of type 'input_audio', but this kit trains text only" in refusal(
        says("user", [{"type": "input_audio", "input_audio": {}}]), says("assistant", "b")
    )
    assert refusal(says("user", "a"), says("assistant", [])).startswith("EMPTY_ASSISTANT")


def test_a_developer_is_read_as_system():
    found = parse(says("developer", "s"), says("user", "a"), says("assistant", "b"))
    assert found.messages[0] == says("system", "s")
    assert found.notes == ("the role 'developer' is read as system",)


def test_calls_may_stand_in_the_text_of_an_answer():
    answer, results = says("assistant", "[look()]"), [says("tool", "7"), says("tool", "8")]
    found = parse(says("user", "a"), answer, *results, says("assistant", "b"))
    assert found.messages[1:4] == [answer, *results] and found.notes == (TOOL_NOTE,)
    called = says("assistant", "", tool_calls=[CALL])
    assert parse(says("user", "a"), called, *results, says("assistant", "b")).notes == ()
    assert refusal(says("user", "a"), says("tool", "7"), says("assistant", "b")) == (
        "BAD_ORDER message 1 has the role 'tool' after 'user', where 'assistant' has its place"
    )


def test_a_refusal_says_what_to_do():
    turns = [says("user", "a"), says("assistant", "b")]
    assert "leave such rows out" in refusal(*turns, images=["a.png"])
    assert "leave such rows or the key out" in refusal(*turns, label=False)
    assert "--response_field chosen" in refusal(prompt="a", chosen="b", rejected="c")
    assert "keep one" in refusal(*turns, system="s", system_prompt="t")
    assert "another in them: keep one" in refusal(says("system", "s"), *turns, system="t")
    assert "under 'reasoning_content', 'thinking', with different texts" in refusal(
        turns[0], says("assistant", "b", reasoning_content="r", thinking="t")
    )
    assert "known are system, user, assistant, tool, developer" in refusal(says("human", "a"), turns[1])
    assert "write it as 'tool_calls'" in refusal(turns[0], says("assistant", "b", function_call={"name": "look"}))


@pytest.mark.parametrize(
    "beside",
    [
        {"tools": '[{"name": "\\ud83d"}]'},
        {"chat_template_kwargs": '{"a": "\\udfff"}'},
        {"tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]},
    ],
)
def test_half_a_surrogate_pair_in_nested_json_is_one_bad_row(beside):
    calls = {"tool_calls": beside.pop("tool_calls")} if "tool_calls" in beside else {}
    with pytest.raises(RowError, match="surrogate") as error:
        parse(says("user", "a"), {**says("assistant", "b"), **calls}, **beside)
    assert error.value.code == "UTF8"
