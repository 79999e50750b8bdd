"""Judges the kit on many chat templates and shapes of conversation: `python -m scripts.templates`.

Without --templates: the templates that ship in the package trl with a twin that marks what the assistant says, and the
kit's own, on tokenizers of bytes. Each run renews its part of docs/templates.md; a wrong cell makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.chat import ChatRenderer
from dataset.formats import Fields
from dataset.reader import parse_conversation
from scripts.templates.families import Case, real, twins
from scripts.templates.judge import RIGHT, SPOKEN, WRONG, Verdict, judge
from scripts.templates.minimind import END, compare
from scripts.templates.oracle import Oracle
from scripts.templates.shapes import PLAIN, Row, shapes

OUT = Path("docs/templates.md")
TRAIN_ON = ("assistant", "last")
BAR = (66, 0.95)  # of the 70 real templates that train plain shapes; of all cells that are right or spoken of


@dataclass
class Line:
    """What came of one template: its cells by kind, and why."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    differences: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    impossible: int = 0  # refused, and transformers cannot render it either
    plain: str = "yes"  # whether the plain shapes are trained


def measure(case: Case) -> Line:
    """Goes through the shapes with one template."""
    line, oracle = Line(case.name), Oracle(case.tokenizer, case.twin)
    rows = shapes(*oracle.spelled())
    for train_on in TRAIN_ON:
        renderer = renderer_of(case.tokenizer, train_on)
        for shape, row in rows.items():
            verdict = look(oracle, renderer, row, train_on)
            line.counts[verdict.kind] += 1
            line.impossible += verdict.impossible
            line.refusals.update([kind_of(verdict.spoken[0])] if verdict.code else [])
            line.notes.update([] if verdict.code else {kind_of(note) for note in verdict.spoken})
            line.differences.update(set(verdict.differences))
            line.wrong += [f"{shape} ({train_on}): {reason}" for reason in verdict.wrong]
            if shape in PLAIN and (verdict.code or verdict.wrong):
                merged = look(oracle, renderer, system_as_user(row), train_on)
                hinted = "--system_as user" in " ".join(verdict.spoken)
                saved = shape == "system" and hinted and not (merged.code or merged.wrong)
                line.plain = "no" if line.plain == "no" or not saved else "system merged"
    return line


def renderer_of(tokenizer: Any, train_on: str) -> ChatRenderer | ValueError:
    try:
        return ChatRenderer(tokenizer, train_on=train_on)
    except ValueError as error:
        return error


def look(oracle: Oracle, renderer: ChatRenderer | ValueError, row: Row, train_on: str) -> Verdict:
    """One cell of the table."""
    conversation = parse_conversation(1, row, "messages", Fields())
    if isinstance(renderer, ValueError):
        return judge(oracle, conversation, train_on, renderer)
    try:
        (result,) = renderer.render_batch([conversation])
    except ValueError as error:  # the whole run is refused
        result = error  # type: ignore[assignment]
    except Exception as error:
        return Verdict(WRONG, [f"crash: {type(error).__name__}: {error}"])
    return judge(oracle, conversation, train_on, result)


def system_as_user(row: Row) -> Row:
    """The row with its system message in front of the first question, for templates that take none."""
    first, second, *rest = row["messages"]
    merged = {**second, "content": f"{first['content']}\n\n{second['content']}"}
    return {**row, "messages": [merged, *rest]} if first["role"] == "system" else row


def kind_of(reason: str) -> str:
    """A reason without what only this row has."""
    reason = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", "…", " ".join(reason.split()))
    return re.sub(r"\d+", "N", reason)


def as_table(lines: list[Line], bar: tuple[int, float] | None = None) -> str:
    """Markdown: a line per template; refusals and notes are numbered, differences have letters, explained below."""
    reasons = sum((line.refusals + line.notes for line in lines), Counter[str]())
    numbers = {reason: str(at) for at, (reason, _) in enumerate(reasons.most_common(), start=1)}
    letters = {
        reason: chr(ord("a") + at) for at, reason in enumerate(sorted({d for x in lines for d in x.differences}))
    }
    table = [
        "| template | right | spoken of | wrong | plain | why, and named differences |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        why = [f"{numbers[reason]} ({count})" for reason, count in (line.refusals + line.notes).most_common()]
        faults = Counter(kind_of(reason.partition("): ")[2]) for reason in line.wrong)
        why += [f"**{reason}** ({count})" for reason, count in faults.most_common()]
        why += [" ".join(sorted(letters[reason] for reason in line.differences))] if line.differences else []
        cells = [str(line.counts[kind]) for kind in (RIGHT, SPOKEN, WRONG)]
        cells[1] += f" ({line.impossible})" if line.impossible else ""
        table.append(f"| {line.name} | {' | '.join(cells)} | {line.plain} | {_shown(', '.join(why))} |")
    legend = [f"{number}. {_shown(reason)} ({reasons[reason]})" for reason, number in numbers.items()]
    named = [f"- {letter}: {_shown(reason)}" for reason, letter in letters.items()]
    said = f"{summary(lines)}\n\n{against(bar, lines)}" if bar else summary(lines)
    parts = [said, "\n".join(table), "Refusals, and notes (in how many cells):", "\n".join(legend)]
    return "\n\n".join([*parts, "Named differences:", "\n".join(named)])


def _shown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def summary(lines: list[Line]) -> str:
    total = sum((line.counts for line in lines), Counter[str]())
    plain = sum(line.plain != "no" for line in lines)
    kinds = ", ".join(f"{total[kind]} {kind}" for kind in (RIGHT, SPOKEN, WRONG))
    impossible = sum(line.impossible for line in lines)
    return (
        f"{len(lines)} templates, {sum(total.values())} cells: {kinds} ({impossible} that transformers cannot render); "
        f"{plain} templates train all plain shapes."
    )


def against(bar: tuple[int, float], lines: list[Line]) -> str:
    """The same beside what it should be at least: templates that train plain shapes, share of cells."""
    total = sum((line.counts for line in lines), Counter[str]())
    plain = sum(line.plain != "no" for line in lines)
    share = 1 - total[WRONG] / max(1, sum(total.values()))
    failed = ", ".join(line.name for line in lines if line.plain == "no") or "none"
    return (
        f"The bar: at least {bar[0]} train all plain shapes ({plain} do; not: {failed}); at least {bar[1]:.0%} of all "
        f"cells are right or spoken of ({share:.1%} are); none is wrong ({total[WRONG]} are)."
    )


def with_table(page: str, part: str, table: str) -> str:
    """The page with one of its tables renewed."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"no place for the table: the lines {begin} and {end} are needed once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def run(cases: Iterable[Case]) -> list[Line]:
    lines = []
    for case in cases:
        began = time.monotonic()
        lines.append(line := measure(case))
        told = ", ".join(f"{line.counts[kind]} {kind}" for kind in (RIGHT, SPOKEN, WRONG))
        print(f"{case.name}: {told}, plain: {line.plain} ({time.monotonic() - began:.1f} s)", flush=True)
        for reason in line.wrong:
            print(f"    {reason}")
    print(summary(lines))
    return lines


def compare_with_minimind(directory: Path, data: Path) -> int:
    try:
        found = compare(directory, data)
    except OSError as error:
        print(f"error: --minimind {directory}, --data {data}: {error}", file=sys.stderr)
        return 2
    for kind, counts in found.items():
        print(f"{kind}: {', '.join(f'{count} {what}' for what, count in counts.most_common())}")
    return int(any(what not in ("same", END) for counts in found.values() for what in counts))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.templates", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--templates", metavar="DIR", type=Path, help="real templates (DIR/templates/*.jinja) on the "
                        "real vocabularies DIR/ggml-vocab-*.gguf; `make templates` fetches both")  # fmt: skip
    parser.add_argument("--minimind", metavar="DIR", type=Path, help="compare with the labels of MiniMind's own code, "
                        "from a checkout of it, on its tokenizer and template; no page is written")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", type=Path, default=Path("../shared/data"), help="GSM8K and tool "
                        "dialogues for --minimind (default ../shared/data)")  # fmt: skip
    parser.add_argument("--only", metavar="REGEX", default="", help="templates whose name has it; no page is written")
    parser.add_argument("--out", metavar="FILE", type=Path, default=OUT, help=f"page to renew (default {OUT})")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was found here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.minimind:
        return compare_with_minimind(options.minimind, options.data)
    part = "real" if options.templates else "twins"
    try:
        page = options.out.read_text(encoding="utf-8")
        with_table(page, part, "")
        if options.templates and not list((options.templates / "templates").glob("*.jinja")):
            raise ValueError(f"--templates {options.templates} has no templates/*.jinja: run `make templates`")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.templates:
        lines = run(real(options.templates, options.only))
    else:
        lines = run(case for case in twins() if re.search(options.only, case.name))
    if not options.only:
        lines.sort(key=lambda line: line.name.lower())
        options.out.write_text(with_table(page, part, as_table(lines, BAR if options.templates else None)))
    if options.json:
        options.json.write_text(json.dumps([vars(line) for line in lines], indent=1, ensure_ascii=False) + "\n")
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main())
