"""The ways in which people write a conversation down, each turned into the messages of OpenAI's form.

A layout only moves text to its place; whether the result is a conversation that can be trained, the reader checks.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataset.errors import RowError
from dataset.strict_json import kind_of, parse_json

Row = dict[str, Any]
Turns = list[Any]  # messages as found, not yet checked

BESIDE = frozenset({"system", "system_prompt", "tools", "chat_template_kwargs"})  # which a row has beside its messages
MARKS = (  # by which a message says whether it is trained, in the words of many kits; `masked` says the opposite
    "weight", "train", "loss", "train_on_turn", "trainable", "training", "loss_weight", "loss_scale", "loss_mask",
    "masked",
)  # fmt: skip
PAIR = frozenset({"chosen", "rejected"})
PAIR_ADVICE = (
    "the row is a preference pair ('chosen' and 'rejected'), but only one answer can be trained: keep the chosen one "
    "(of texts, by --prompt_field prompt --response_field chosen)"
)
OF_A_TREE = frozenset({"parent_id", "message_tree_id"})  # keys of messages that OASST keeps one by one
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
SHAREGPT_ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Fields:
    """Names of the columns of a prompt and response file; all None for a file of another layout.

    Several columns, separated by commas, make one prompt.
    """

    prompt: str | None = None
    response: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None) or (self.system is not None and self.prompt is None):
            raise ValueError(
                f"prompt_field={self.prompt!r}, response_field={self.response!r}, system_field={self.system!r}: "
                "prompt and response go together, and a system field goes with them"
            )
        if self.prompt is not None and not all(self.prompts):
            raise ValueError(f"prompt_field={self.prompt!r} has an empty name in it")

    @property
    def prompts(self) -> list[str]:
        return [name.strip() for name in (self.prompt or "").split(",")]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name in (*self.prompts, self.response, self.system) if name)


@dataclass(frozen=True)
class Layout:
    """`fits` recognises a row of the layout; `turns` gives its messages and tools, or raises RowError.

    `keys` are those of a row that are read; the layout of named fields also reads the fields that were named. A cell of
    CSV holds JSON under `json_cells`, and text, or messages as JSON, under `message_cells`.
    """

    spoken: str
    keys: frozenset[str]
    fits: Callable[[Row], bool]
    turns: Callable[[Row, Fields], tuple[Turns, Any]]
    json_cells: frozenset[str] = frozenset()
    message_cells: frozenset[str] = frozenset()


def _messages(row: Row, _: Fields) -> tuple[Turns, Any]:
    return _with_beside(row, _turns(row, "messages"))


def _conversations(row: Row, _: Fields) -> tuple[Turns, Any]:
    return _with_beside(row, _turns(row, "conversations"))


def _with_beside(row: Row, turns: Turns) -> tuple[Turns, Any]:
    """The messages, with the system text that the row has beside them in front, and the tools of the row.

    MiniMind keeps the tools in the first message.
    """
    tools, opening = row.get("tools"), _opening(row)
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if not tools and "tools" in first:
        tools = first["tools"]
        turns = [{key: value for key, value in first.items() if key != "tools"}, *turns[1:]]
    if opening and first.get("role") in ("system", "developer"):
        if opening[0]["content"] != first.get("content"):
            raise RowError("BAD_ORDER", "the row has a system text beside its messages and another in them: keep one")
        return turns, tools
    return [*opening, *turns], tools


def _sharegpt(row: Row, _: Fields) -> tuple[Turns, Any]:
    turns: Turns = []
    for index, turn in enumerate(_turns(row, "conversations")):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowError("BAD_TYPE", f"{where} must be an object, found {kind_of(turn)}")
        name = text(turn, "from", where)
        if name not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowError("UNKNOWN_ROLE", f"{where} is from {name[:40]!r}, known are {known}")
        message: Row = {"role": SHAREGPT_ROLES[name]}
        value = turn.get("value")
        if value is None and message["role"] != "tool" and not turn.get("tool_calls"):
            text(turn, "value", where)  # says what is there instead
        if len(turn) > 2:
            if turn.get("content") not in (None, "", value):
                raise RowError("BAD_TYPE", f"{where} has a 'value' and another text as 'content': keep one")
            message = {key: item for key, item in turn.items() if key not in ("from", "value")} | message
        if name == "function_call":
            calls = nested_json(text(turn, "value", where), where)
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        else:
            message["content"] = value
        turns.append(message)
    return _with_beside(row, turns)


def _question(row: Row, names: list[str]) -> str:
    """The texts under these keys, one after the other on lines of their own, without those that say nothing."""
    said = [text(row, name, "the row") for name in names if row.get(name) not in (None, "")]
    return "\n".join(said) if said else text(row, names[0], "the row")


def _alpaca(row: Row, _: Fields) -> tuple[Turns, Any]:
    question, turns = _question(row, ["instruction", "input"]), []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("BAD_TYPE", f"'history' of the row must be a list of pairs, found {kind_of(history)}")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError("BAD_TYPE", f"history[{index}] must be a list of a question and an answer")
        turns += _pair(*pair)
    return _with_beside(row, turns + _pair(question, text(row, "output", "the row")))


def _dolly(row: Row, _: Fields) -> tuple[Turns, Any]:
    question = _question(row, ["instruction", "input", "context"])
    return _with_beside(row, _pair(question, text(row, "response", "the row")))


def _xlam(row: Row, _: Fields) -> tuple[Turns, Any]:
    """A question and the calls that answer it; no text does."""
    asked, calls = text(row, "query", "the row"), required(row, "answers", "the row")
    return _with_beside(
        row, [{"role": "user", "content": asked}, {"role": "assistant", "content": "", "tool_calls": calls}]
    )


def _ultrachat(row: Row, _: Fields) -> tuple[Turns, Any]:
    """Texts of which the user has the first, the assistant the second, and so on; LIMA calls them conversations."""
    roles = itertools.cycle(("user", "assistant"))
    turns = _turns(row, "data" if "data" in row or "conversations" not in row else "conversations")
    return _with_beside(row, [{"role": next(roles), "content": said} for said in turns])


def _prompt(row: Row, _: Fields) -> tuple[Turns, Any]:
    """TRL's prompt and completion: both texts, or both lists of messages."""
    prompt, completion = required(row, "prompt", "the row"), required(row, "completion", "the row")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _with_beside(row, [*map(_untrained, prompt), *completion])
    return _with_beside(row, _pair(text(row, "prompt", "the row"), text(row, "completion", "the row")))


def _untrained(turn: Any) -> Any:
    """A message of a prompt, which is trained only if it says so itself."""
    if not isinstance(turn, dict) or any(turn.get(mark) is not None for mark in MARKS):
        return turn
    return {**turn, "train": False}


def _fields(row: Row, fields: Fields) -> tuple[Turns, Any]:
    assert fields.prompt is not None and fields.response is not None
    opening = _system_message(text(row, fields.system, "the row")) if fields.system else []
    return opening + _pair(_question(row, fields.prompts), text(row, fields.response, "the row")), None


LAYOUTS = {
    "messages": Layout(
        "OpenAI messages",
        BESIDE | {"messages"},
        lambda row: "messages" in row,
        _messages,
        json_cells=frozenset({"messages", "tools"}),
    ),
    "sharegpt": Layout(
        "ShareGPT conversations (from, value)",
        BESIDE | {"conversations"},
        lambda row: _speaks_sharegpt(row),
        _sharegpt,
        json_cells=frozenset({"conversations", "tools"}),
    ),
    "conversations": Layout(
        "MiniMind conversations (role, content)",
        BESIDE | {"conversations"},
        lambda row: "conversations" in row and not _are_texts(row["conversations"]),
        _conversations,
        json_cells=frozenset({"conversations", "tools"}),
    ),
    "alpaca": Layout(
        "Alpaca (instruction, input, output)",
        BESIDE | {"instruction", "input", "output", "history"},
        lambda row: "output" in row and ("instruction" in row or _asks_by_input(row)),
        _alpaca,
    ),
    "prompt": Layout(
        "prompt and completion",
        BESIDE | {"prompt", "completion"},
        lambda row: {"prompt", "completion"} <= row.keys(),
        _prompt,
        message_cells=frozenset({"prompt", "completion"}),
    ),
    "text": Layout(
        "plain text, trained whole", frozenset({"text"}), lambda row: _is_text(row), lambda row, _: ([], None)
    ),
    "dolly": Layout(
        "Dolly (instruction, context, response)",
        BESIDE | {"instruction", "input", "context", "response"},
        lambda row: {"instruction", "response"} <= row.keys(),
        _dolly,
    ),
    "xlam": Layout(
        "xLAM (query, tools, answers)",
        BESIDE | {"query", "answers"},
        lambda row: {"query", "tools", "answers"} <= row.keys(),
        _xlam,
    ),
    "ultrachat": Layout(
        "UltraChat (texts of user and assistant in turn)",
        BESIDE | {"data", "conversations"},
        lambda row: _are_texts(row.get("data")) or _are_texts(row.get("conversations")),
        _ultrachat,
    ),
    "fields": Layout(
        "named prompt and response fields", frozenset({"chat_template_kwargs"}), lambda row: False, _fields
    ),
}


def _asks_by_input(row: Row) -> bool:
    """Whether a row without instruction asks by its input; one with a text beside it has always been a text."""
    return isinstance(row.get("input"), str) and "text" not in row


def _is_text(row: Row) -> bool:
    """Whether the text of a row stands for itself; one of many messages of a tree (OASST) does not."""
    return "text" in row and not ("role" in row and OF_A_TREE & row.keys())


def _are_texts(value: Any) -> bool:
    """Whether a value is a list of texts, at least one."""
    return isinstance(value, list) and value != [] and all(isinstance(said, str) for said in value)


def _speaks_sharegpt(row: Row) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _turns(row: Row, key: str) -> Turns:
    advice = "; --data_format, or --prompt_field and --response_field, say how to read it"
    turns = required(row, key, "the row", advice)
    if not isinstance(turns, list) or not turns:
        raise RowError("BAD_TYPE", f"{key} must be a list with at least one message, found {kind_of(turns)}")
    return turns


def _opening(row: Row) -> Turns:
    """The system message, where the row has one beside its messages that says something."""
    content = ""
    for key in ("system", "system_prompt"):
        if row.get(key) is not None:
            given = text(row, key, "the row")
            if content.strip() and given.strip() and given != content:
                raise RowError("BAD_TYPE", "the row has a 'system' and a 'system_prompt' that differ: keep one")
            content = content if content.strip() else given
    return _system_message(content)


def _system_message(content: str) -> Turns:
    return [{"role": "system", "content": content}] if content.strip() else []


def _pair(question: Any, answer: Any) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object, a list of nulls."""
    if isinstance(value, list):
        return all(item is None for item in value)
    return value is None or value == "" or value == {}


def refuse_media(key: str, value: Any, where: str) -> None:
    """Raises RowError for pictures and such, without which an answer about them would be trained blind."""
    if key in MEDIA and isinstance(value, (str, list, dict, bytes)):
        advice = "leave such rows out, or take the key out where the text says enough"
        raise RowError("MEDIA", f"{where} has {key!r}, but this kit trains text only: {advice}")


def required(row: Row, key: str, where: str, advice: str = "") -> Any:
    """The value of a key; raises RowError that shows which keys there are."""
    if key in row:
        return row[key]
    if row.keys() >= PAIR:
        raise RowError("UNWANTED", PAIR_ADVICE)
    found = ", ".join(repr(name[:40]) for name in list(row)[:10]) or "no key at all"
    raise RowError("MISSING_FIELD", f"{where} has no {key!r}, it has {found}{advice}")


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
