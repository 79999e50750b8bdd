"""The ways in which people write a conversation down, each turned into the messages of OpenAI's form.

A layout only moves text to its place; whether the result is a conversation that can be trained, the reader checks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataset.files import RowError, kind_of, parse_json

Row = dict[str, Any]
Turns = list[Any]  # messages as found, not yet checked

SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Fields:
    """Names of the columns of a prompt and response file; all None for a file of another layout."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None) or (self.system is not None and self.prompt is None):
            raise ValueError(
                f"prompt_field={self.prompt!r}, response_field={self.response!r}, system_field={self.system!r}: "
                "prompt and response go together, and a system field goes with them"
            )


@dataclass(frozen=True)
class Layout:
    """`fits` recognises a row of the layout; `turns` gives its messages and tools, or raises RowError."""

    spoken: str
    fits: Callable[[Row], bool]
    turns: Callable[[Row, Fields], tuple[Turns, Any]]


def _messages(row: Row, _: Fields) -> tuple[Turns, Any]:
    return _with_system(row, _turns(row, "messages")), _tools(row, row["messages"])


def _conversations(row: Row, _: Fields) -> tuple[Turns, Any]:
    return _with_system(row, _turns(row, "conversations")), _tools(row, row["conversations"])


def _with_system(row: Row, turns: Turns) -> Turns:
    """The messages, with what the row says beside them in `system` in front."""
    return [*_opening(row, "system"), *turns]


def _tools(row: Row, turns: Turns) -> Any:
    """The tools of the row, or those in its first message, where MiniMind keeps them."""
    first = turns[0]
    return first.get("tools") if row.get("tools") is None and isinstance(first, dict) else row.get("tools")


def _sharegpt(row: Row, _: Fields) -> tuple[Turns, Any]:
    turns = _opening(row, "system")
    for index, turn in enumerate(_turns(row, "conversations")):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowError("BAD_TYPE", f"{where} must be an object, found {kind_of(turn)}")
        name, value = text(turn, "from", where), text(turn, "value", where)
        if name not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowError("UNKNOWN_ROLE", f"{where} is from {name[:40]!r}, known are {known}")
        more = {key: turn[key] for key in ("weight", "train", "reasoning_content") if key in turn}
        if name == "function_call":
            calls = nested_json(value, where)
            more |= {"tool_calls": calls if isinstance(calls, list) else [calls]}
        turns.append({"role": SHAREGPT_ROLES[name], "content": "" if name == "function_call" else value, **more})
    return turns, _tools(row, row["conversations"])


def _alpaca(row: Row, _: Fields) -> tuple[Turns, Any]:
    question = text(row, "instruction", "the row")
    if row.get("input") not in (None, ""):
        question += "\n" + text(row, "input", "the row")
    turns = _opening(row, "system")
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("BAD_TYPE", f"'history' of the row must be a list of pairs, found {kind_of(history)}")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError("BAD_TYPE", f"history[{index}] must be a list of a question and an answer")
        turns += _pair(*pair)
    return turns + _pair(question, text(row, "output", "the row")), row.get("tools")


def _prompt(row: Row, _: Fields) -> tuple[Turns, Any]:
    """TRL's prompt and completion: both texts, or both lists of messages."""
    prompt, completion = required(row, "prompt", "the row"), required(row, "completion", "the row")
    if isinstance(prompt, list) and isinstance(completion, list):
        earlier = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt]
        return _with_system(row, [*earlier, *completion]), row.get("tools")
    pair = _pair(text(row, "prompt", "the row"), text(row, "completion", "the row"))
    return _with_system(row, pair), row.get("tools")


def _fields(row: Row, fields: Fields) -> tuple[Turns, Any]:
    assert fields.prompt is not None and fields.response is not None
    opening = _opening(row, fields.system, needed=True) if fields.system else []
    return opening + _pair(text(row, fields.prompt, "the row"), text(row, fields.response, "the row")), None


LAYOUTS = {
    "messages": Layout("OpenAI messages", lambda row: "messages" in row, _messages),
    "sharegpt": Layout("ShareGPT conversations (from, value)", lambda row: _speaks_sharegpt(row), _sharegpt),
    "conversations": Layout(
        "MiniMind conversations (role, content)", lambda row: "conversations" in row, _conversations
    ),
    "alpaca": Layout(
        "Alpaca (instruction, input, output)", lambda row: {"instruction", "output"} <= row.keys(), _alpaca
    ),
    "prompt": Layout("prompt and completion", lambda row: {"prompt", "completion"} <= row.keys(), _prompt),
    "text": Layout("plain text, trained whole", lambda row: "text" in row, lambda row, _: ([], None)),
    "fields": Layout("named prompt and response fields", lambda row: False, _fields),
}


def _speaks_sharegpt(row: Row) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _turns(row: Row, key: str) -> Turns:
    turns = required(row, key, "the row")
    if not isinstance(turns, list) or not turns:
        raise RowError("BAD_TYPE", f"{key} must be a list with at least one message, found {kind_of(turns)}")
    return turns


def _opening(row: Row, key: str, needed: bool = False) -> Turns:
    """The system message, where the row has one that says something."""
    if not needed and row.get(key) is None:
        return []
    content = text(row, key, "the row")
    return [{"role": "system", "content": content}] if content.strip() else []


def _pair(question: Any, answer: Any) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def required(row: Row, key: str, where: str) -> Any:
    """The value of a key; raises RowError that shows which keys there are."""
    if key not in row:
        found = ", ".join(repr(name[:40]) for name in list(row)[:10]) or "no key at all"
        raise RowError("MISSING_FIELD", f"{where} has no {key!r}, it has {found}")
    return row[key]


def text(row: Row, key: str, where: str) -> str:
    """The string under a key; raises RowError where there is none."""
    value = required(row, key, where)
    if not isinstance(value, str):
        raise RowError("BAD_TYPE", f"{key!r} of {where} must be a string, found {kind_of(value)}")
    return value


def nested_json(value: str, where: str) -> Any:
    """What a string holds as JSON; raises RowError naming the place of the string."""
    try:
        return parse_json(value)
    except RowError as error:
        raise RowError(error.code, f"in the JSON string {where}: {error}") from error
