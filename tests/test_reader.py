"""Every way in which a row can be wrong is refused with its code and line, and what is right comes through whole."""

import gzip
import json
from pathlib import Path

import pytest

from dataset import raw_rows as files
from dataset.errors import DataError, Defect
from dataset.formats import Fields
from dataset.reader import Conversation, detect_layout, read_conversations
from tests.small_world import SHARED

COLUMNS = Fields("question", "answer")


def chat(*messages: object, key: str = "messages", **row: object) -> bytes:
    return json.dumps({key: list(messages), **row}).encode()


def user(content: object = "hello") -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object = "hi", **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": "look", "arguments": arguments or {}}}


GOOD = chat(user(), assistant())
ANSWER = b'{"role": "assistant", "content": "hi"}'

BAD_ROWS = [
    ("UTF8", GOOD.replace(b"hello", b"h\xffllo")),
    ("UTF8", GOOD.replace(b"hello", b"\xc3")),
    ("UTF8", GOOD.replace(b"hello", b"\\ud83d")),
    ("UTF8", GOOD.replace(b"hello", b"\\uDE00\\uD83D")),
    ("JSON_SYNTAX", GOOD[:-1]),
    ("JSON_SYNTAX", GOOD + b" " + GOOD),
    ("JSON_SYNTAX", GOOD.replace(b'"', b"'")),
    ("JSON_SYNTAX", GOOD.replace(b"hello", b"he\x00llo")),
    ("JSON_SYNTAX", GOOD.replace(b"hello", b"he\tllo")),
    ("JSON_SYNTAX", b"\x00" * 40),
    ("JSON_SYNTAX", b'{"a": ' + b"[" * 100_000),
    ("JSON_SYNTAX", b'{"n": ' + b"9" * 5_000 + b"}"),
    ("NOT_OBJECT", b"[" + GOOD + b"]"),
    ("NOT_OBJECT", b'"text"'),
    ("NOT_OBJECT", b"null"),
    ("NOT_OBJECT", b"7"),
    ("DUPLICATE_KEY", b'{"messages": [], "messages": [' + ANSWER + b"]}"),
    ("DUPLICATE_KEY", b'{"messages": [{"role": "user", "role": "user", "content": "x"}, ' + ANSWER + b"]}"),
    ("NON_FINITE", b'{"score": NaN, ' + GOOD[1:]),
    ("NON_FINITE", b'{"score": -Infinity, ' + GOOD[1:]),
    ("NON_FINITE", b'{"score": 1e999, ' + GOOD[1:]),
    ("MISSING_FIELD", b"{}"),
    ("MISSING_FIELD", b'{"text": "hello"}'),
    ("MISSING_FIELD", chat({"content": "hello"}, assistant())),
    ("MISSING_FIELD", chat(user(), {"role": "assistant"})),
    ("MISSING_FIELD", chat({"from": "human", "value": "hello"})),
    ("MISSING_FIELD", chat(user(), assistant(tool_calls=[{"function": {"name": "look", "parameters": {"a": 1}}}]))),
    ("MISSING_FIELD", chat(user([{"type": "text"}]), assistant())),
    ("MISSING_FIELD", chat(user(), assistant(tool_calls=[{"function": {"arguments": {}}}]))),
    ("BAD_TYPE", b'{"messages": null}'),
    ("BAD_TYPE", b'{"messages": []}'),
    ("BAD_TYPE", b'{"messages": "hello"}'),
    ("BAD_TYPE", b'{"messages": {"role": "user"}}'),
    ("BAD_TYPE", chat(user(), "hi")),
    ("BAD_TYPE", chat(user(), None)),
    ("BAD_TYPE", chat(user(None), assistant())),
    ("BAD_TYPE", chat(user(7), assistant())),
    ("BAD_TYPE", chat(user(True), assistant())),
    ("BAD_TYPE", chat(user({"type": "text", "text": "hello"}), assistant())),
    ("BAD_TYPE", chat(user([{"type": "tool_use", "name": "look"}]), assistant())),
    ("BAD_TYPE", chat(user([{"text": "hello"}]), assistant())),
    ("BAD_TYPE", chat(user([7]), assistant())),
    ("MEDIA", chat(user([{"type": "image"}, {"type": "text", "text": "hello"}]), assistant())),
    ("MEDIA", chat(user([{"type": "image_url", "image_url": {"url": "a.png"}}]), assistant())),
    ("MEDIA", chat(user(), assistant(), images=["a.png"])),
    ("MEDIA", chat(user(), assistant(), audio={"path": "a.wav"})),
    ("MEDIA", chat({**user(), "video": "a.mp4"}, assistant())),
    ("UNWANTED", chat(user(), assistant(), label=False)),
    ("UNWANTED", chat(user(), chosen=assistant(), rejected=assistant("no"))),
    ("UNWANTED", json.dumps({"prompt": "hello", "chosen": "hi", "rejected": "no"}).encode()),
    ("BAD_TYPE", chat(user(), assistant(None))),
    ("BAD_TYPE", chat({"role": 3, "content": "hello"}, assistant())),
    ("BAD_TYPE", chat(user(), assistant(reasoning_content=["hm"]))),
    ("BAD_TYPE", chat(user(), assistant(tool_calls={"name": "look"}))),
    ("BAD_TYPE", chat(user(), assistant(tool_calls=["look"]))),
    ("BAD_TYPE", chat(user(), assistant(tool_calls=[{"function": "look"}]))),
    ("BAD_TYPE", chat(user(), assistant(tool_calls=[call([1])]))),
    ("BAD_TYPE", chat(user(), assistant(tool_calls=[call("[1]")]))),
    ("BAD_TYPE", chat(user(), assistant(), tools={"name": "look"})),
    ("BAD_TYPE", chat({**user(), "tool_calls": [call()]}, assistant())),
    ("JSON_SYNTAX", chat(user(), assistant(tool_calls=[call("{")]))),
    ("DUPLICATE_KEY", chat(user(), assistant(tool_calls=[call('{"a": 1, "a": 2}')]))),
    ("UNKNOWN_ROLE", chat({"role": "human", "content": "hello"}, assistant())),
    ("UNKNOWN_ROLE", chat({"role": "", "content": "hello"}, assistant())),
    ("UNKNOWN_ROLE", chat({"role": "User", "content": "hello"}, assistant())),
    ("BAD_ORDER", chat(assistant())),
    ("BAD_ORDER", chat(user(), user(), assistant())),
    ("BAD_ORDER", chat(user(), assistant(), assistant())),
    ("BAD_ORDER", chat(user(), {"role": "system", "content": "be brief"}, assistant())),
    ("BAD_ORDER", chat({"role": "system", "content": "be brief"}, assistant())),
    ("BAD_ORDER", chat(user(), {"role": "tool", "content": "7"}, assistant())),
    ("BAD_ORDER", chat({"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, user(), assistant())),
    ("BAD_ORDER", chat({"role": "system", "content": "a"}, user(), assistant(), system="b")),
    ("BAD_ORDER", chat(user(), assistant(tool_calls=[call()]), {"role": "tool", "content": "7"}, user())),
    ("NO_ASSISTANT", chat(user())),
    ("NO_ASSISTANT", chat({"role": "system", "content": "be brief"}, user())),
    ("EMPTY_ASSISTANT", chat(user(), assistant(""))),
    ("EMPTY_ASSISTANT", chat(user(), assistant(" \n\t"), user(), assistant())),
    ("EMPTY_ASSISTANT", chat(user(), assistant("", tool_calls=[], reasoning_content=" "))),
    ("BAD_TYPE", chat(user(), assistant(weight=0.5))),
    ("BAD_TYPE", chat(user(), assistant(function_call={"name": "look", "arguments": "{}"}))),
    ("BAD_TYPE", chat(user(), assistant(train="no"))),
    ("BAD_TYPE", chat(user(), assistant(train=True, weight=0))),
    ("BAD_TYPE", chat({**user(), "train": True}, assistant())),
    ("BAD_TYPE", chat({**user(), "masked": False}, assistant())),
    ("BAD_TYPE", chat(user(), assistant(loss_weight=0.5))),
    ("BAD_TYPE", chat(user(), assistant(loss_mask=[0, 1]))),
    ("BAD_TYPE", chat(user(), assistant(loss=True, masked=True))),
    ("BAD_TYPE", chat(user(), assistant(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]))),
    ("BAD_TYPE", chat(user(), assistant(reasoning="a", thinking="b"))),
    ("BAD_TYPE", chat(user(), assistant(reasoning_content="a", reasoning="b"))),
    ("BAD_TYPE", chat(user(), assistant(thinking=["hm"]))),
    ("BAD_TYPE", chat(user(), assistant(), system="a", system_prompt="b")),
    ("BAD_TYPE", chat(user(), assistant(), chat_template_kwargs=[1])),
    ("BAD_TYPE", chat(user(), assistant(), chat_template_kwargs={"add_generation_prompt": True})),
    ("BAD_TYPE", chat(user(), assistant(), chat_template_kwargs={"bos_token": "x"})),
]


def read(path: Path, fields: Fields = Fields()) -> list[Conversation | Defect]:  # noqa: B008  (it is frozen)
    return list(read_conversations(path, fields))


def test_there_are_sixty_kinds_of_bad_rows():
    assert len({row for _, row in BAD_ROWS}) >= 60


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(("code", "row"), BAD_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_refused_by_code_and_line_and_alone(tmp_path, code, row, name, place):
    lines = [GOOD, GOOD]
    lines.insert(place, row)
    path = tmp_path / name
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = read(path)
    refused = [(item.line, item.code) for item in found if isinstance(item, Defect)]
    assert refused == [(place + 1, code)]
    assert len(found) == 3
    kept = [item for item in found if isinstance(item, Conversation)]
    assert [item.messages for item in kept] == [[user(), assistant()]] * 2
    assert f"{path}:{place + 1}: {code} " in str(next(item for item in found if isinstance(item, Defect)))


def test_what_is_harmless_at_the_ends_of_a_file_is_refused_in_its_middle(tmp_path):
    path = tmp_path / "rows.jsonl"
    for code, row in (
        ("UTF8", GOOD.decode().encode("utf-16")), ("UTF8", b"\xef\xbb\xbf" + GOOD), ("BLANK_LINE", b""),
        ("BLANK_LINE", b" \t\r"),
    ):  # fmt: skip
        path.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD + b"\n")
        assert [getattr(item, "code", "") for item in read(path)] == ["", code, ""]


def test_a_bad_last_row_needs_no_line_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-9])
    assert [type(item) for item in read(path)] == [Conversation, Defect]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=["lf", "crlf", "none"])
def test_line_ends_of_all_systems_are_read(tmp_path, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + (end or b"\n") + GOOD + end)
    assert [item.line for item in read(path)] == [1, 2]
    assert all(isinstance(item, Conversation) for item in read(path))


def test_a_line_without_end_is_given_up_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + chat(user("x" * 1000), assistant()) + b"\n" + GOOD + b"\n")
    assert [getattr(item, "code", "") for item in read(path)] == ["", "LINE_TOO_LONG", ""]


@pytest.mark.parametrize(("make", "code"), [("touch", "EMPTY_FILE"), ("mkdir", "NO_FILE"), ("exists", "NO_FILE")])
def test_a_file_that_gives_no_line_is_one_defect(tmp_path, make, code):
    path = tmp_path / "rows.jsonl"
    getattr(path, make)()
    (defect,) = read(path)
    assert (defect.line, defect.code) == (0, code)


def test_the_layout_is_found_behind_bad_first_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n[]\n" + chat(user(), assistant(), key="conversations") + b"\n")
    assert detect_layout(path, Fields()) == "conversations"
    assert [getattr(item, "code", "") for item in read(path)] == ["JSON_SYNTAX", "NOT_OBJECT", ""]
    path.write_bytes(b"{\n[]\n" + chat(user(), assistant(), key="conversations", question="q", answer="a") + b"\n")
    assert detect_layout(path, COLUMNS) == "fields"


def test_a_row_in_another_layout_than_the_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + chat(user(), assistant(), key="conversations") + b"\n")
    defect = read(path)[1]
    assert defect.code == "MISSING_FIELD"
    assert defect.message == (
        "the row has no 'messages', it has 'conversations'; "
        "--data_format, or --prompt_field and --response_field, say how to read it"
    )


def test_named_fields_become_messages(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": "1+1?", "answer": "2", "system": "Be brief."},
        {"question": "2+2?", "answer": "4", "system": ""},
        {"question": "3+3?", "answer": " "},
        {"question": None, "answer": "8"},
        {"answer": "8"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path, Fields("question", "answer", "system"))
    assert found[0].messages == [{"role": "system", "content": "Be brief."}, user("1+1?"), assistant("2")]
    assert found[1].messages == [user("2+2?"), assistant("4")]
    assert [item.code for item in found[2:]] == ["MISSING_FIELD", "MISSING_FIELD", "MISSING_FIELD"]
    assert [item.code for item in read(path, COLUMNS)[2:]] == ["EMPTY_ASSISTANT", "BAD_TYPE", "MISSING_FIELD"]


@pytest.mark.parametrize("names", [("q", None, None), (None, "a", None), (None, None, "s")])
def test_half_a_pair_of_fields_is_refused(names):
    with pytest.raises(ValueError, match="go together"):
        Fields(*names)


def test_minimind_rows_and_openai_rows_give_the_same_conversation(tmp_path):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    arguments = {"city": "Köln", "days": 2}
    openai = chat(
        {"role": "system", "content": "Help."},
        user(),
        assistant(None, tool_calls=[call(arguments)], reasoning_content="look first"),
        {"role": "tool", "content": "rain", "name": "look"},
        assistant("It rains."),
        tools=tools,
    )
    minimind = chat(
        {"role": "system", "content": "Help.", "tools": json.dumps(tools)},
        user(),
        assistant(
            "",
            tool_calls=json.dumps([{"name": "look", "arguments": json.dumps(arguments)}]),
            reasoning_content="look first",
        ),
        {"role": "tool", "content": "rain", "name": "look"},
        assistant("It rains.", tool_calls="", reasoning_content=None),
        key="conversations",
    )
    found = []
    for row in (openai, minimind):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(row)
        found += read(path)
    assert found[0] == found[1]
    assert found[0].tools == tools
    assert found[0].messages[2] == assistant("", tool_calls=[call(arguments)], reasoning_content="look first")
    assert "tool_calls" not in found[0].messages[4]


def test_text_arrives_as_it_was_written(tmp_path):
    text = '  \u2028 "quotes"\t\\n 你好 😀\u0000 <|im_end|>\n'
    path = tmp_path / "rows.jsonl"
    for ascii_only in (True, False):
        path.write_text(json.dumps({"messages": [user(text), assistant(text)]}, ensure_ascii=ascii_only), "utf-8")
        (row,) = read(path)
        assert [message["content"] for message in row.messages] == [text, text]


def test_a_data_error_shows_twenty_defects_and_counts_all():
    defects = [Defect("a.jsonl", line, "UTF8", "not UTF-8") for line in range(1, 31)]
    error = DataError(defects)
    assert error.defects == defects
    lines = str(error).splitlines()
    assert lines[0] == "a.jsonl:1: UTF8 not UTF-8"
    assert len(lines) == 21
    assert lines[-1] == "30 defects in the data, 10 of them not shown"
    assert str(DataError(defects[:1])).splitlines()[-1] == "1 defect in the data"


def test_a_hundred_thousand_rows_are_all_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(chat(user(f"question {i}"), assistant(f"answer {i}")) + b"\n" for i in range(100_000)))
    kept = sum(isinstance(item, Conversation) for item in read_conversations(path, Fields()))
    assert kept == 100_000


@pytest.mark.parametrize(
    ("name", "fields", "rows"), [("gsm8k/train.jsonl", COLUMNS, 7473), ("sgd/dev.jsonl", Fields(), 256)]
)
def test_real_files_are_read_without_a_defect(name, fields, rows):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = read(path, fields)
    assert len(found) == rows
    assert [item for item in found if isinstance(item, Defect)] == []
