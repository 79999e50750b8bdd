"""Conversations from data files: rows in any layout become validated messages, and every refused row a `Defect`."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.errors import DataError, Defect, RowError
from dataset.formats import LAYOUTS, PAIR, PAIR_ADVICE, Fields, is_blank, nested_json, refuse_media, text
from dataset.hints import holds_columns, no_layout, unknown_field
from dataset.messages import Message, as_json, objects, parse_message
from dataset.raw_rows import columns_of, read_rows
from dataset.strict_json import kind_of

OVERLONG = ("error", "drop", "truncate")  # what may become of a sample that is longer than a row
BAD_ROWS = ("error", "skip")  # and of a row that cannot be trained
VANISHED = ("error", "warn")  # and of one whose answer the chat template does not write
SYSTEM_AS = ("system", "user")  # where a system message stands
DETECTION_ROWS = 100
FOLLOWS = {  # which roles may come after which; "" is the start of the conversation
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), True),
    **dict.fromkeys(("false", "0", "0.0", "no"), False),
}  # by which people say whether an answer is wanted
OWN_VARIABLES = frozenset({  # which a template gets from the row, the tokenizer or transformers
    "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "padding", "truncation", "max_length", "strftime_now", "raise_exception", "loop",
    "range", "namespace", "dict", "joiner", "cycler", "lipsum", "additional_special_tokens",
})  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """One validated row: messages with roles in order and the tools that they may call, or a text to train whole.

    `wishes` holds the messages (by number) that say whether they want to be trained, `variables` what the row hands to
    the chat template, and `notes` what was read otherwise than it was written, or not read.
    """

    line: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    wishes: dict[int, bool] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def detect_layout(path: Path, fields: Fields, named: str = "auto") -> str:
    """Returns the name in LAYOUTS that was asked for, or that most of the first rows speak for.

    Raises DataError, with one defect for all rows, where none of them fits any layout.
    """
    if named == "fields" or (named == "auto" and fields.prompt is not None):
        _refuse_unknown(path, fields)
        return "fields"
    if named != "auto":
        return named
    votes: Counter[str] = Counter()
    seen: list[dict[str, Any]] = []
    first = 0
    for line, row in itertools.islice(read_rows(path), DETECTION_ROWS):
        if isinstance(row, dict):
            first = first or line
            seen.append(row)
            votes.update(itertools.islice((name for name, layout in LAYOUTS.items() if layout.fits(row)), 1))
    if seen and (not votes or holds_columns(seen)):
        error = no_layout(seen, path)
        raise DataError([Defect(str(path), first, error.code, str(error))])
    return votes.most_common(1)[0][0] if votes else "messages"  # no row could be read


def _refuse_unknown(path: Path, fields: Fields) -> None:
    """Raises DataError for the first of the named fields that no row of the file has.

    One of several parts of a prompt may be absent from a file, unless a field of nearly its name is there.
    """
    seen, first = dict.fromkeys(columns_of(path)), 0
    for line, row in read_rows(path):
        if isinstance(row, dict):
            first = first or line
            seen.update(row)
            if seen.keys() >= fields.names:
                return
    if first:
        named = [("--prompt_field", name) for name in fields.prompts]
        named += [("--response_field", fields.response or ""), ("--system_field", fields.system or "")]
        some = any(name in seen for name in fields.prompts)
        for flag, name in named:
            if name and name not in seen:
                told, is_near = unknown_field(name, [each for each in seen if each not in fields.names])
                if is_near or flag != "--prompt_field" or not some:
                    raise DataError([Defect(str(path), first, "NO_LAYOUT", f"{flag}: {told}")])


def read_conversations(path: Path, fields: Fields, layout: str = "auto") -> Iterator[Conversation | Defect]:
    """Yields one item for each row of the file: its conversation, or the reason why there is none."""
    try:
        layout = detect_layout(path, fields, layout)
    except DataError as error:
        yield from error.defects
        return
    for line, row in read_rows(path):
        try:
            yield parse_conversation(line, row, layout, fields)
        except RowError as error:
            yield Defect(str(path), line, error.code, str(error))


def parse_conversation(line: int, row: dict[str, Any] | RowError, layout: str, fields: Fields) -> Conversation:
    """The conversation of a row in a layout; raises RowError where it holds none that can be trained."""
    if isinstance(row, RowError):
        raise row
    notes: list[str] = []
    keys = LAYOUTS[layout].keys
    if layout == "fields":
        keys = keys.union(fields.names)
    if not row.keys() <= keys:
        _look_beside(row, keys, layout, notes)
    if layout == "fields" and not row.keys() >= set(fields.prompts):
        notes += [f"the prompt is without the field {name!r}" for name in fields.prompts if name not in row]
    if layout == "alpaca" and is_blank(row.get("instruction")) and not is_blank(row.get("input")):
        notes.append("there is no instruction, so the input alone is the question")
    if layout == "text":
        whole = text(row, "text", "the row")
        if not whole.strip():
            raise RowError("EMPTY_TEXT", "the text is blank: leave such rows out")
        return Conversation(line, [], text=whole, notes=tuple(notes))
    turns, tools = LAYOUTS[layout].turns(row, fields)
    messages: list[Message] = []
    wishes: dict[int, bool] = {}
    for index, turn in enumerate(turns):
        message, wish = parse_message(turn, f"message {index}", notes)
        messages.append(message)
        if wish is not None:
            wishes[index] = wish
    if messages and messages[-1]["role"] == "user" and row.keys() >= PAIR:
        raise RowError("UNWANTED", PAIR_ADVICE)
    _check_order(messages, notes)
    variables = _variables(row) if "chat_template_kwargs" in row else {}
    return Conversation(
        line, messages, objects(tools, "tools") or None, None, wishes, variables, tuple(dict.fromkeys(notes))
    )


def _look_beside(row: dict[str, Any], keys: frozenset[str], layout: str, notes: list[str]) -> None:
    """Notes the keys of a row that nobody reads; refuses those that say that it should not be trained as it stands."""
    for key, value in row.items():
        if key in keys or is_blank(value):
            continue
        refuse_media(key, value, "the row")
        of_an_answer = {"prompt", "completion"} <= keys or (isinstance(value, bool) and layout != "text")
        if key == "label" and of_an_answer:  # elsewhere it says what a text is
            if unwanted(value):
                raise RowError(
                    "UNWANTED", f"'label' is {str(value)[:40]!r}, so the answer is bad: leave such rows or the key out"
                )
            continue
        notes.append(f"the field {key[:40]!r} is not read")


def unwanted(label: Any) -> bool:
    """Whether the label of an answer (KTO) says that it is bad; raises RowError for one that may mean anything."""
    said = str(label).strip().lower() if isinstance(label, (str, bool, int, float)) else ""
    if said not in LABELS:
        raise RowError(
            "BAD_TYPE",
            f"'label' is {str(label)[:40]!r}, which does not say whether the answer is wanted: write true or false, or "
            "give the key another name",
        )
    return not LABELS[said]


def _variables(row: dict[str, Any]) -> dict[str, Any]:
    """What a row hands to the chat template, such as `enable_thinking`."""
    value, where = row["chat_template_kwargs"], "'chat_template_kwargs' of the row"
    if isinstance(value, str) and value.strip():
        value = nested_json(value, where)
    if is_blank(value):
        return {}
    if not isinstance(value, dict):
        raise RowError("BAD_TYPE", f"{where} must be an object, found {kind_of(value)}")
    for name in value:
        if name in OWN_VARIABLES or name.endswith("_token"):
            raise RowError(
                "BAD_TYPE", f"{where} sets {name[:40]!r}, which the row itself or the tokenizer decides: take it out"
            )
    as_json(value, where)
    return value


def _check_order(messages: list[Message], notes: list[str]) -> None:
    before: Message = {"role": ""}
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWS[before["role"]]:
            place = f"after {before['role']!r}" if index else "at the start"
            allowed = " or ".join(map(repr, FOLLOWS[before["role"]]))
            raise RowError("BAD_ORDER", f"message {index} has the role {role!r} {place}, where {allowed} has its place")
        if role == "tool" and before["role"] == "assistant" and "tool_calls" not in before:
            notes.append("tool results follow answers whose call stands in their text")
        before = message
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("NO_ASSISTANT", "there is no assistant turn to train on: leave such rows out")
