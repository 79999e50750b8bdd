"""What to say, once for a file, of rows that no layout fits: which fields there are, and the way out."""

import shlex
from pathlib import Path

from dataset.layouts import OF_A_TREE, PAIR, PAIR_ADVICE, Row
from dataset.strict_json import RowError

QUESTIONS = ("instruction", "question", "query", "problem", "prompt", "input", "inputs", "user")
ANSWERS = ("response", "output", "solution", "answer", "answers", "completion", "target", "targets", "reply")
SYSTEMS = ("system_prompt", "system")
TREE = 'join each path from its root to a leaf into a row of its own, {"messages": […]}'
UNWRAP = """python -c "import json; json.dump(json.load(open('{path}'))['{key}'], open('rows_of_{path.name}', 'w'))\""""


def no_layout(rows: list[Row], path: Path) -> RowError:
    """The error of a file whose first rows are these, none of which any layout fits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if set(names) >= PAIR:
        if "prompt" in names:
            return RowError("UNWANTED", PAIR_ADVICE)
        advice = 'but only one answer can be trained: write the chosen dialogue as {"messages": […]}'
        return RowError("UNWANTED", f"the rows are preference pairs ('chosen' and 'rejected'), {advice}")
    found = ", ".join(repr(name[:40]) for name in names[:12]) or "no key at all"
    return RowError("NO_LAYOUT", f"no layout fits; the rows have {found}: {_way_out(rows, names, path)}")


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
            return f"{found!r} holds messages; rename it to {known!r}"
    texts = {name.lower(): name for name in names if any(isinstance(row.get(name), str) for row in rows)}
    question, answer, system = (
        next((texts[name] for name in known if name in texts), None) for known in (QUESTIONS, ANSWERS, SYSTEMS)
    )
    if question and answer:
        questions = f"{question},{texts['context']}" if "context" in texts else question
        flags = f"--prompt_field {shlex.quote(questions)} --response_field {shlex.quote(answer)}"
        return f"{flags}{f' --system_field {shlex.quote(system)}' if system else ''} reads them"
    if objects and len(rows) == 1:
        name = next(iter(objects))
        return f"{name!r} holds the rows; unwrap them by {UNWRAP.format(path=path, key=name)}"
    return "name the fields of the question and the answer by --prompt_field and --response_field"
