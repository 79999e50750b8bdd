"""The table of public sets in docs/data.md, line by line: what a row of each layout becomes, or how it is refused.

Keys, roles and marks are those of the sets; the words are ours.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from dataset.errors import Defect
from dataset.formats import Fields
from dataset.reader import Conversation, read_conversations
from tests.test_public_rows import ROWS as TOOL_ROWS

FERRY = {"name": "ferry_times", "description": "When it leaves", "parameters": {"port": {"type": "str"}}}
CALL = {"name": "ferry_times", "arguments": {"port": "Kiel"}}
ASKED = "When does it leave?"
SAID = "At half past eight."
PLAIN = f"user: {ASKED} | assistant: {SAID}"
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SPEAKERS = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]

SETS = {  # name in the table: (row, flags, what it becomes)
    "Alpaca": (
        {"instruction": "Say when.", "input": ASKED, "output": SAID, "text": "### Instruction: …"},
        "",
        f"user: Say when.\n{ASKED} | assistant: {SAID}",
    ),
    "Dolly": (
        {"instruction": ASKED, "context": "It leaves at 08:30.", "response": SAID, "category": "closed_qa"},
        "",
        f"user: {ASKED}\nIt leaves at 08:30. | assistant: {SAID}",
    ),
    "ShareGPT": ({"id": "a_1", "conversations": SPEAKERS}, "", PLAIN),
    "OpenHermes 2.5": (
        {
            "conversations": [{"from": "system", "value": "Help."}, *SPEAKERS],
            "source": "airoboros", "category": "trip", "system_prompt": None, "skip_prompt_formatting": False,
        },
        "",
        f"system: Help. | {PLAIN}",
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Help.", "weight": None},
                {"from": "human", "value": ASKED, "weight": 0.0},
                {"from": "gpt", "value": SAID, "weight": 1.0},
            ]
        },
        "",
        f"system: Help. | {PLAIN}",
    ),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "Help.", "question": ASKED, "response": SAID},
        "--prompt_field question --response_field response --system_field system_prompt",
        f"system: Help. | {PLAIN}",
    ),
    "UltraChat": ({"id": "0", "data": [ASKED, SAID]}, "", PLAIN),
    "LIMA": ({"conversations": [ASKED, SAID], "source": "stackexchange"}, "", PLAIN),
    "UltraChat 200k": ({"prompt": ASKED, "prompt_id": "f", "messages": TURNS}, "", PLAIN),
    "Tulu 3": ({"id": "flan_1", "messages": TURNS, "source": "ai2-adapt-dev/flan"}, "", PLAIN),
    "SmolTalk": ({"messages": TURNS, "source": "smol-magpie-ultra"}, "", PLAIN),
    "xLAM": (
        {"id": 0, "query": ASKED, "tools": json.dumps([FERRY]), "answers": json.dumps([CALL])},
        "",
        f"user: {ASKED} | assistant: {json.dumps([CALL])}",
    ),
    "Hermes function calling": (TOOL_ROWS["hermes function calling v1"][0], "", "system user assistant tool assistant"),
    "ToolACE": (TOOL_ROWS["toolace"][0], "", "system user assistant tool assistant"),
    "OpenThoughts": (TOOL_ROWS["openthoughts"][0], "", "user assistant"),
    "OpenR1-Math": (
        {"problem": ASKED, "solution": SAID, "answer": "8:30", "generations": ["<think>…"], "messages": TURNS},
        "",
        PLAIN,
    ),
    "s1K": (
        {"question": ASKED, "solution": SAID, "thinking_trajectories": ["Look it up."], "cot_type": "math"},
        "--prompt_field question --response_field solution",
        PLAIN,
    ),
    "MetaMathQA": (
        {"type": "MATH_AnsAug", "query": ASKED, "original_question": "When?", "response": SAID},
        "--prompt_field query --response_field response",
        PLAIN,
    ),
    "GSM8K": ({"question": ASKED, "answer": SAID}, "--prompt_field question --response_field answer", PLAIN),
    "BELLE": ({"instruction": ASKED, "input": "", "output": SAID}, "", PLAIN),
    "BELLE 3.5M": ({"id": "16", "conversations": [SPEAKERS[0], {**SPEAKERS[1], "from": "assistant"}]}, "", PLAIN),
    "Firefly": (
        {"kind": "NLI", "input": ASKED, "target": SAID}, "--prompt_field input --response_field target", PLAIN
    ),
    "MiniMind, chat": ({"conversations": TURNS}, "", PLAIN),
    "MiniMind, pretraining": ({"text": SAID}, "", SAID),
    "UltraFeedback, binarized": (
        {"prompt": ASKED, "chosen": TURNS, "rejected": TURNS, "messages": TURNS, "score_chosen": 8.5}, "", PLAIN
    ),
    "preference texts": (
        {"prompt": ASKED, "chosen": SAID, "rejected": "Never."}, "--prompt_field prompt --response_field chosen", PLAIN
    ),
}  # fmt: skip

REFUSED = {  # name in the table: (row, code, words of the message)
    "Capybara": (
        {"source": "GPT4LLM", "conversation": [{"input": ASKED, "output": SAID}]},
        "NO_LAYOUT",
        "'conversation' holds questions and answers as 'input' and 'output'",
    ),
    "Nemotron post-training": (
        {"input": TURNS[:1], "output": SAID, "category": "chat"},
        "NO_LAYOUT",
        "'input' holds messages and 'output' what answers them; append",
    ),
    "Glaive function calling v2": (
        {"system": "SYSTEM: Help.", "chat": "USER: When?\n\n\nASSISTANT: Soon. <|endoftext|>"},
        "NO_LAYOUT",
        "the text under 'chat' is a whole dialogue",
    ),
    "OASST": (
        {"message_id": "b", "parent_id": "a", "text": SAID, "role": "assistant", "message_tree_id": "a", "lang": "en"},
        "NO_LAYOUT",
        "each is one message of a tree",
    ),
    "OASST, its first messages": (
        {"message_id": "a", "text": ASKED, "role": "prompter", "message_tree_id": "a"},
        "NO_LAYOUT",
        "each is one message of a tree",
    ),
    "OASST, trees": (
        {"message_tree_id": "a", "tree_state": "ready_for_export", "prompt": {"text": ASKED, "replies": []}},
        "NO_LAYOUT",
        "each is a tree of messages",
    ),
    "WildChat": (
        {"conversation_hash": "c", "model": "m", "conversation": TURNS, "language": "English"},
        "NO_LAYOUT",
        "'conversation' holds messages; rename it to 'messages'",
    ),
    "HH": (
        {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {SAID}", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: No."},
        "UNWANTED",
        "write the chosen dialogue as",
    ),
    "MiniMind, preferences": ({"chosen": TURNS, "rejected": TURNS}, "UNWANTED", "write the chosen dialogue as"),
    "UltraFeedback": (
        {"source": "evol", "instruction": ASKED, "models": ["m"], "completions": [{"model": "m", "response": SAID}]},
        "NO_LAYOUT",
        "name the fields of the question and the answer",
    ),
}


def write(tmp_path, *rows: dict) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields_of(flags: str) -> Fields:
    words = shlex.split(flags)
    given = dict(zip(words[::2], words[1::2], strict=True))
    return Fields(given.get("--prompt_field"), given.get("--response_field"), given.get("--system_field"))


def said_by(found: Conversation) -> str:
    if found.text is not None:
        return found.text
    calls = [[call["function"] for call in message.get("tool_calls", [])] for message in found.messages]
    return " | ".join(
        f"{message['role']}: {json.dumps(called) if called else message['content']}"
        for message, called in zip(found.messages, calls, strict=True)
    )


@pytest.mark.parametrize("name", SETS)
def test_a_row_of_a_public_set_is_read(tmp_path, name):
    row, flags, expected = SETS[name]
    for found in read_conversations(write(tmp_path, row, row), fields_of(flags)):
        assert isinstance(found, Conversation), found
        roles = " ".join(message["role"] for message in found.messages)
        assert expected in (said_by(found), roles)


@pytest.mark.parametrize("name", [name for name, (_, flags, _) in SETS.items() if flags])
def test_without_flags_the_one_error_of_the_file_names_them(tmp_path, name):
    row, flags, _ = SETS[name]
    (found,) = read_conversations(write(tmp_path, *[row] * 300), Fields())
    assert isinstance(found, Defect) and found.line == 1
    assert flags in found.message


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_misread_is_refused_once_with_the_way_out(tmp_path, name):
    row, code, words = REFUSED[name]
    (found,) = read_conversations(write(tmp_path, *[row] * 300), Fields())
    assert isinstance(found, Defect) and (found.line, found.code) == (1, code)
    assert words in found.message


def test_the_table_has_a_line_for_each_of_them():
    table = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8").split("## Public sets")[1]
    lines = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", table.split("\n## ")[0], flags=re.M))
    assert {*SETS, *REFUSED} == set(lines) - {"set", "---"}
    for name, (_, flags, _) in SETS.items():
        assert f"`{flags}`" in lines[name] if flags else "refused" not in lines[name]
    for name, (_, code, _) in REFUSED.items():
        assert f"refused, `{code}`" in lines[name]


@pytest.mark.parametrize(
    ("row", "question", "note"),
    [
        ({"input": "q", "output": "b"}, "q", True),
        ({"instruction": "", "input": "q", "output": "b"}, "q", True),
        ({"instruction": None, "input": "q", "output": "b"}, "q", True),
        ({"instruction": "a", "input": "", "output": "b"}, "a", False),
        ({"instruction": "a", "input": None, "output": "b"}, "a", False),
        ({"instruction": "a", "output": "b"}, "a", False),
    ],
)
def test_an_alpaca_row_asks_by_what_it_has(tmp_path, row, question, note):
    (found,) = read_conversations(write(tmp_path, row), Fields())
    assert [message["content"] for message in found.messages] == [question, "b"]
    assert found.notes == (("there is no instruction, so the input alone is the question",) if note else ())


def test_several_fields_make_one_prompt(tmp_path):
    fields = Fields("instruction, context", "response")
    rows = [{"instruction": "a", "context": "c", "response": "b"}, {"instruction": "a", "context": "", "response": "b"}]
    found = list(read_conversations(write(tmp_path, *rows, {"instruction": "a", "response": "b"}), fields))
    assert [each.messages[0]["content"] for each in found] == ["a\nc", "a", "a"]
    assert [each.notes for each in found] == [(), (), ("the prompt is without the field 'context'",)]
    lone, whole = read_conversations(write(tmp_path, {"response": "b"}, rows[0]), fields)
    assert isinstance(lone, Defect) and lone.code == "MISSING_FIELD" and isinstance(whole, Conversation)
    for wrong in ("a,", ",a", "a,,b", " "):
        with pytest.raises(ValueError, match="empty name"):
            Fields(wrong, "response")


@pytest.mark.parametrize("key", ["data", "train", 'it\'s "$HOME"'])
def test_a_file_whose_rows_stand_under_a_key_says_how_to_unwrap_them(tmp_path, key, monkeypatch):
    import subprocess
    import sys

    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, key: [{"instruction": ASKED, "output": SAID}] * 3}, indent=1))
    (found,) = read_conversations(path, Fields())
    assert isinstance(found, Defect) and f"{key!r} holds the rows" in found.message
    command = shlex.split(found.message.split("unwrap them by ")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert len(list(read_conversations(tmp_path / "rows_of_rows.json", Fields()))) == 3


def test_fields_of_any_spelling_are_found(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Question;The Context;Answer\na;b;c\n")
    (found,) = read_conversations(path, Fields())
    assert isinstance(found, Defect) and "--prompt_field Question --response_field Answer" in found.message
    assert "'The Context'" in found.message and found.line == 2


def test_a_layout_that_is_named_is_taken_as_before(tmp_path):
    (found,) = read_conversations(write(tmp_path, REFUSED["OASST"][0]), Fields(), "text")
    assert isinstance(found, Conversation) and found.text == SAID


def test_the_hint_takes_context_and_a_lone_row_with_tools_for_what_they_are(tmp_path):
    row = {"question": "a", "context": "c", "answer": "b", "steps": [{"a": 1}]}
    (found,) = read_conversations(write(tmp_path, row), Fields())
    assert "--prompt_field question,context --response_field answer reads them" in found.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (Fields("instruction,inptu", "output"), "--prompt_field: no row has 'inptu', .*: 'input' may be meant"),
        (Fields("Instruction", "output"), "--prompt_field: no row has 'Instruction', .*: 'instruction' may be meant"),
        (Fields("instruction", "answer"), "--response_field: no row has 'answer', the rows have"),
        (Fields("instruction", "output", "sistem"), "--system_field: no row has 'sistem', .*: 'system' may be meant"),
    ],
)
def test_a_field_that_no_row_has_is_refused_once_with_the_nearest(tmp_path, fields, message):
    row = {"instruction": "a", "input": "", "output": "b", "system": "s"}
    (found,) = read_conversations(write(tmp_path, row, row), fields)
    assert isinstance(found, Defect) and (found.line, found.code) == (1, "NO_LAYOUT")
    assert re.match(message, found.message)


def test_a_part_of_the_prompt_that_a_file_lacks_is_only_noted(tmp_path):
    """Files of one run may differ in that, and nothing there has a name like it."""
    (found,) = read_conversations(write(tmp_path, {"q": "1", "a": "2", "id": 3}), Fields("q,context", "a"))
    assert "the prompt is without the field 'context'" in found.notes


def test_a_field_that_comes_late_or_is_an_empty_column_is_there(tmp_path):
    from pyarrow import Table, parquet

    fields, row = Fields("q,context", "a"), {"q": "1", "a": "2"}
    found = list(read_conversations(write(tmp_path, *[row] * 150, {**row, "context": "c"}), fields))
    assert [each.messages[0]["content"] for each in found[-2:]] == ["1", "1\nc"]
    parquet.write_table(Table.from_pylist([{**row, "context": None}]), tmp_path / "rows.parquet")
    (only,) = read_conversations(tmp_path / "rows.parquet", fields)
    assert isinstance(only, Conversation)


@pytest.mark.parametrize("label", [False, 0, 0.0, "0", "no", "No", "FALSE ", "false"])
def test_answers_that_a_label_calls_bad_are_refused_in_every_spelling(tmp_path, label):
    row = {"prompt": "a", "completion": "b", "label": label}
    for fields in (Fields(), Fields("prompt", "completion")):
        (found,) = read_conversations(write(tmp_path, row), fields)
        assert isinstance(found, Defect) and found.code == "UNWANTED" and repr(str(label)) in found.message


@pytest.mark.parametrize("label", [True, 1, 1.0, "1", "yes", "True", " TRUE"])
def test_answers_that_a_label_calls_good_are_trained(tmp_path, label):
    (found,) = read_conversations(write(tmp_path, {"prompt": "a", "completion": "b", "label": label}), Fields())
    assert isinstance(found, Conversation) and found.notes == ()


@pytest.mark.parametrize("label", [2, -1, 0.5, "good", "n", [1], {"a": 1}])
def test_a_label_of_an_answer_that_may_mean_anything_is_refused(tmp_path, label):
    (found,) = read_conversations(write(tmp_path, {"prompt": "a", "completion": "b", "label": label}), Fields())
    assert isinstance(found, Defect) and found.code == "BAD_TYPE" and repr(str(label)) in found.message


def test_lima_is_read_as_texts_in_turn(tmp_path):
    (found,) = read_conversations(write(tmp_path, {"conversations": ["q", "a"], "source": "x"}), Fields())
    assert isinstance(found, Conversation) and found.notes == ("the field 'source' is not read",)
    assert found.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "rows.csv",
            "Instruction,Input,Output\na,b,c\n",
            "--prompt_field Instruction,Input --response_field Output reads",
        ),
        (
            "rows.jsonl",
            {"input": [{"role": "user", "content": "q"}], "output": "a"},
            "'output' what answers them; append",
        ),
        ("rows.jsonl", {"conversation": [{"input": "q", "output": "a"}], "source": "x"}, "questions and answers as"),
        ("rows.jsonl", {"steps": [{"a": 1}], "n": 1}, "name the fields of the question and the answer by"),
        ("rows.json", {"instruction": ["a", "b"], "output": ["c", "d"]}, "one object of columns"),
        ("rows.json", {"instruction": {"0": "a"}, "output": {"0": "b"}}, "one object of columns"),
    ],
)
def test_rows_of_other_forms_hear_what_to_do(tmp_path, name, row, message):
    (tmp_path / name).write_text(row if isinstance(row, str) else json.dumps(row) + "\n")
    (found,) = read_conversations(tmp_path / name, Fields())
    assert isinstance(found, Defect) and found.code == "NO_LAYOUT"
    assert message in found.message and "unwrap" not in found.message
