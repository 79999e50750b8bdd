"""What to say, once for a file, of rows that no layout fits: which fields there are, and the way out."""

import difflib
import json
import shlex
from pathlib import Path

from dataset.errors import RowError
from dataset.formats import LAYOUTS, OF_A_TREE, PAIR, PAIR_ADVICE, Row

QUESTIONS = ("instruction", "question", "query", "problem", "prompt", "input", "inputs", "user")
ANSWERS = ("response", "output", "solution", "answer", "answers", "completion", "target", "targets", "reply")
SYSTEMS = ("system_prompt", "system")
TREE = 'join each path from its root to a leaf into a row of its own, {"messages": […]}'
UNWRAP = (
    'python -c "import json, sys; path, key, new = sys.argv[1:]; '
    "json.dump(json.load(open(path))[key], open(new, 'w'))\""
)
AS_ROWS = "with pandas, df.to_json(NEW, orient='records', lines=True)"


def no_layout(rows: list[Row], path: Path) -> RowError:
    """The error of a file whose first rows are these, none of which any layout fits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if holds_columns(rows):
        found = ", ".join(repr(name[:40]) for name in names[:12])
        return RowError("NO_LAYOUT", f"the file is one object of columns ({found}), not of rows: write rows, {AS_ROWS}")
    if set(names) >= PAIR:
        if "prompt" in names:
            return RowError("UNWANTED", PAIR_ADVICE)
        advice = 'but only one answer can be trained: write the chosen dialogue as {"messages": […]}'
        return RowError("UNWANTED", f"the rows are preference pairs ('chosen' and 'rejected'), {advice}")
    found = ", ".join(repr(name[:40]) for name in names[:12]) or "no key at all"
    return RowError("NO_LAYOUT", f"no layout fits; the rows have {found}: {_way_out(rows, names, path)}")


def holds_columns(rows: list[Row]) -> bool:
    """Whether the only row of a file is a table by columns, as pandas writes it: lists, or objects of the same keys."""
    values = list(rows[0].values()) if len(rows) == 1 else []
    if len(values) < 2 or LAYOUTS["ultrachat"].fits(rows[0]):
        return False
    if all(isinstance(value, list) and value and not isinstance(value[0], dict) for value in values):
        return len({len(value) for value in values}) == 1
    return all(isinstance(value, dict) and value and value.keys() == values[0].keys() for value in values)


def unknown_field(name: str, names: list[str]) -> tuple[str, bool]:
    """That no row has a field, and which one may be meant; whether there is such a one."""
    lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), lower, 1)
    found = ", ".join(repr(each[:40]) for each in names[:12]) or "no key at all"
    meant = f": {lower[near[0]]!r} may be meant" if near else ""
    return f"no row has {name!r}, the rows have {found}{meant}", bool(near)


def _way_out(rows: list[Row], names: list[str], path: Path) -> str:
    if {"text", "role"} <= set(names) and OF_A_TREE & set(names):
        return f"each is one message of a tree; {TREE}"
    if {"message_tree_id", "prompt"} <= set(names):
        return f"each is a tree of messages; {TREE}"
    if {"system", "chat"} <= set(names):
        return "the text under 'chat' is a whole dialogue; write it as {\"messages\": […]} first"
    lists = {name: value[0] for name, value in rows[0].items() if isinstance(value, list) and value}
    objects = {name: first for name, first in lists.items() if isinstance(first, dict)}
    for key, known in (("role", "messages"), ("from", "conversations")):
        if found := next((name for name, first in objects.items() if key in first), None):
            if answer := next((name for name in ANSWERS if name != found and isinstance(rows[0].get(name), str)), None):
                turn = {"role": "assistant", "content": "…"} if key == "role" else {"from": "gpt", "value": "…"}
                said = json.dumps(turn, ensure_ascii=False)
                return f"{found!r} holds messages and {answer!r} what answers them; append {said} to it, as {known!r}"
            return f"{found!r} holds messages; rename it to {known!r}"
    may_hold_rows = len(rows) == 1 and path.suffix.lower() == ".json"
    pairs = next((name for name, first in objects.items() if {"input", "output"} <= first.keys()), None)
    if pairs and not (may_hold_rows and len(lists) == len(rows[0]) == 1):
        return f"{pairs!r} holds questions and answers as 'input' and 'output'; write them as {{\"messages\": […]}}"
    texts = {name.lower(): name for name in names if any(isinstance(row.get(name), str) for row in rows)}
    question, answer, system = (
        next((texts[name] for name in known if name in texts), None) for known in (QUESTIONS, ANSWERS, SYSTEMS)
    )
    if question and answer:
        beside = [texts[name] for name in ("input", "context") if name in texts]
        questions = ",".join(dict.fromkeys([question, *(name for name in beside if name != answer)]))
        flags = f"--prompt_field {shlex.quote(questions)} --response_field {shlex.quote(answer)}"
        return f"{flags}{f' --system_field {shlex.quote(system)}' if system else ''} reads them"
    if objects and may_hold_rows:
        name = next(iter(objects))
        command = " ".join([UNWRAP, *(shlex.quote(word) for word in (str(path), name, f"rows_of_{path.name}"))])
        return f"{name!r} holds the rows; unwrap them by {command}"
    return "name the fields of the question and the answer by --prompt_field and --response_field"
