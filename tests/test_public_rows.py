"""Rows in the shape of data sets that people train on, with words of our own: what is trained, refused and noted.

The keys, roles and marks are those of the sets and kits that each row is named after.
"""

import json

import pytest

from dataset.errors import Defect
from dataset.formats import Fields
from dataset.reader import Conversation, read_conversations

TOOLS = [{"type": "function", "function": {"name": "ferry_times", "parameters": {"type": "object", "properties": {}}}}]
CALL = '{"name": "ferry_times", "arguments": {"port": "Kiel"}}'
IN_TEXT = "tool results follow answers whose call stands in their text"


def unread(*keys: str) -> tuple[str, ...]:
    return tuple(f"the field {key!r} is not read" for key in keys)


def speaks(who: str, value: str, **more: object) -> dict[str, object]:
    return {"from": who, "value": value, **more}


def says(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


ASKED = says("user", "When does the ferry leave?")
ROWS = {  # name: (row, roles, which answers are trained by the default, notes)
    "hermes function calling v1": (
        {
            "id": "a-1",
            "conversations": [
                speaks("system", f"Call tools inside <tools>{json.dumps(TOOLS)}</tools>."),
                speaks("human", "When does the ferry leave Kiel?"),
                speaks("gpt", f"<tool_call>\n{CALL}\n</tool_call>"),
                speaks("tool", '<tool_response>\n{"leaves": "08:30"}\n</tool_response>'),
                speaks("gpt", "At half past eight."),
            ],
            "tools": json.dumps(TOOLS),
            "category": "Travel",
            "subcategory": "Ferries",
            "task": "Timetable",
        },
        "system user assistant tool assistant",
        [2, 4],
        (*unread("id", "category", "subcategory", "task"), IN_TEXT),
    ),
    "toolace": (
        {
            "system": "Answer with calls in brackets.",
            "conversations": [
                speaks("user", "When does the ferry leave Kiel?"),
                speaks("assistant", '[ferry_times(port="Kiel")]'),
                speaks("tool", '[{"name": "ferry_times", "results": {"leaves": "08:30"}}]'),
                speaks("assistant", "At half past eight."),
            ],
        },
        "system user assistant tool assistant",
        [2, 4],
        (IN_TEXT,),
    ),
    "openthoughts": (
        {
            "difficulty": 3,
            "source": "riddles",
            "domain": "math",
            "conversations": [
                speaks("human", "Is 91 a prime?"),
                speaks("gpt", "<think>\n91 = 7 * 13\n</think>\n\nNo."),
            ],
        },
        "user assistant",
        [1],
        unread("difficulty", "source", "domain"),
    ),
    "multilingual thinking, for gpt-oss": (
        {
            "reasoning_language": "German",
            "developer": "Be brief.",
            "user": "Is 91 a prime?",
            "analysis": "91 ist 7 mal 13.",
            "final": "No.",
            "messages": [
                says("system", "Be brief.", thinking=None),
                says("user", "Is 91 a prime?", thinking=None),
                says("assistant", "No.", thinking="91 ist 7 mal 13."),
            ],
        },
        "system user assistant",
        [2],
        unread("reasoning_language", "developer", "user", "analysis", "final"),
    ),
    "llama-factory, sharegpt with tools": (
        {
            "conversations": [
                speaks("human", "When does the ferry leave Kiel?"),
                speaks("function_call", CALL),
                speaks("observation", '{"leaves": "08:30"}'),
                speaks("gpt", "At half past eight."),
            ],
            "system": "Help.",
            "tools": json.dumps(TOOLS),
        },
        "system user assistant tool assistant",
        [2, 4],
        (),
    ),
    "llama-factory v1": (
        {
            "messages": [
                says("system", [{"type": "text", "value": "Help."}], loss_weight=0.0),
                says("user", [{"type": "text", "value": "When?"}], loss_weight=0.0),
                says("assistant", [{"type": "text", "value": "Never."}], loss_weight=0.0),
                says("user", [{"type": "text", "value": "Really?"}], loss_weight=0.0),
                says("assistant", [{"type": "text", "value": "At half past eight."}], loss_weight=1.0),
            ]
        },
        "system user assistant user assistant",
        [4],
        (),
    ),
    "ms-swift": (
        {
            "messages": [
                ASKED,
                says("assistant", "Never.", loss=False),
                says("user", "Really?"),
                says("assistant", "At half past eight.", loss=True),
            ],
            "images": [],
            "rejected_response": "No idea.",
        },
        "user assistant user assistant",
        [3],
        unread("rejected_response"),
    ),
    "axolotl, trained by turn": (
        {
            "conversations": [
                speaks("system", "Help.", train=False),
                speaks("human", "When?", train_on_turn=False),
                speaks("gpt", "Never.", training=False),
                speaks("human", "Really?", masked=True),
                speaks("gpt", "At half past eight.", train_on_turn=True),
            ]
        },
        "system user assistant user assistant",
        [4],
        (),
    ),
    "kto, a wanted answer": (
        {"prompt": [ASKED], "completion": [says("assistant", "At half past eight.")], "label": True},
        "user assistant",
        [1],
        (),
    ),
    "openai fine-tuning": (
        {
            "messages": [
                says("developer", "Help."),
                says("user", [{"type": "text", "text": "When?"}]),
                says("assistant", "Never.", weight=0, refusal=None),
                says("user", "Really?"),
                says("assistant", None, tool_calls=[
                    {"id": "c1", "type": "function", "function": {"name": "ferry_times", "arguments": ""}},
                ]),
                says("tool", "08:30", tool_call_id="c1"),
                says("assistant", "At half past eight.", weight=1),
            ],
            "tools": TOOLS,
            "parallel_tool_calls": False,
        },
        "system user assistant user assistant tool assistant",
        [4, 6],
        (
            *unread("parallel_tool_calls"),
            "the role 'developer' is read as system",
            "empty arguments of a tool call are read as {}",
        ),
    ),
    "minimind": (
        {
            "conversations": [
                says("system", "Help.", tools=json.dumps(TOOLS)),
                says("user", "When?"),
                says("assistant", "", reasoning_content="Look it up.", tool_calls=json.dumps([json.loads(CALL)])),
                says("tool", "08:30"),
                says("assistant", "At half past eight."),
            ]
        },
        "system user assistant tool assistant",
        [2, 4],
        (),
    ),
    "zephyr's ultrafeedback, whose messages hold the chosen answer": (
        {
            "prompt": "When?",
            "prompt_id": "b",
            "chosen": [says("user", "When?"), says("assistant", "At half past eight.")],
            "rejected": [says("user", "When?"), says("assistant", "No idea.")],
            "messages": [says("user", "When?"), says("assistant", "At half past eight.")],
            "score_chosen": 8.5,
        },
        "user assistant",
        [1],
        unread("prompt", "prompt_id", "chosen", "rejected", "score_chosen"),
    ),
    "qwen3, with a switch for the template": (
        {
            "messages": [ASKED, says("assistant", "At half past eight.")],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "user assistant",
        [1],
        (),
    ),
}  # fmt: skip


def read(tmp_path, row: dict, fields: Fields) -> Conversation | Defect:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = read_conversations(path, fields)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_public_row_is_trained_as_its_authors_mean_it(tmp_path, name):
    row, roles, trained, notes = ROWS[name]
    found = read(tmp_path, row, Fields())
    assert isinstance(found, Conversation), found
    assert [message["role"] for message in found.messages] == roles.split()
    answers = [index for index, message in enumerate(found.messages) if message["role"] == "assistant"]
    assert [answer for answer in answers if found.wishes.get(answer, True)] == trained
    assert found.notes == notes
    assert found.variables == row.get("chat_template_kwargs", {})
    assert (found.tools == TOOLS) if "ferry_times" in json.dumps(row.get("tools", "")) else True


def test_reasoning_of_public_rows_arrives(tmp_path):
    for name, reasoning in (("multilingual thinking, for gpt-oss", "91 ist 7 mal 13."), ("minimind", "Look it up.")):
        found = read(tmp_path, ROWS[name][0], Fields())
        assert [message.get("reasoning_content") for message in found.messages if "reasoning_content" in message] == [
            reasoning
        ]


PAIR = {"chosen": "At half past eight.", "rejected": "No idea."}
REFUSED = {
    "kto, an unwanted answer": ({"messages": [ASKED, says("assistant", "No idea.")], "label": False}, "UNWANTED"),
    "trl preference": ({"prompt": "When?", **PAIR}, "UNWANTED"),
    "llama-factory preference": (
        {
            "conversations": [speaks("human", "When?")],
            "chosen": speaks("gpt", PAIR["chosen"]),
            "rejected": speaks("gpt", PAIR["rejected"]),
        },
        "UNWANTED",
    ),
    "llava": (
        {
            "id": "c",
            "image": "c.jpg",
            "conversations": [speaks("human", "<image>\nWho?"), speaks("gpt", "A cat.")],
        },
        "MEDIA",
    ),
    "ms-swift with pictures": (
        {"messages": [says("user", "<image>Who?"), says("assistant", "A cat.")], "images": ["c.jpg"]},
        "MEDIA",
    ),
    "openai with pictures": (
        {
            "messages": [
                says("user", [{"type": "image_url", "image_url": {"url": "c.jpg"}}, {"type": "text", "text": "Who?"}]),
                says("assistant", "A cat."),
            ]
        },
        "MEDIA",
    ),
    "axolotl, parts of a turn": (
        {
            "conversations": [
                speaks("human", "When?"),
                speaks("gpt", "Soon.", train_detail=[{"begin_offset": 0, "end_offset": 3, "train": False}]),
            ]
        },
        "BAD_TYPE",
    ),
    "anthropic's blocks": (
        {"messages": [ASKED, says("assistant", [{"type": "tool_use", "name": "ferry_times", "input": {}}])]},
        "BAD_TYPE",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_public_row_that_would_be_trained_wrong_is_refused(tmp_path, name):
    row, code = REFUSED[name]
    found = read(tmp_path, row, Fields())
    assert isinstance(found, Defect) and found.code == code, found


def test_the_chosen_answers_of_pairs_can_be_named(tmp_path):
    found = read(tmp_path, {"prompt": "When?", **PAIR}, Fields("prompt", "chosen"))
    assert isinstance(found, Conversation) and found.messages[1] == says("assistant", PAIR["chosen"])
    assert found.notes == unread("rejected")
