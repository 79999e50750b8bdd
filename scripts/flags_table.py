"""Write the table of flags, from their one definition, into a README:   python -m scripts.flags_table README.md"""

import argparse
import dataclasses
from pathlib import Path

from training.config import Config

BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"


def flags_table() -> str:
    """One Markdown table per group of flags."""
    lines, group = [], ""
    for f in dataclasses.fields(Config):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"**{group}**", "", "| flag | default | what it does |", "|---|---|---|"]
        default = int(f.default) if isinstance(f.default, bool) else f.default
        shown = "" if default in (None, "") else f"`{default}`"
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        lines.append(f"| `--{f.name}` | {shown} | {f.metadata['help']}{choices} |")
    return "\n".join(lines[1:])


def with_table(text: str) -> str:
    """The README with its table renewed; ValueError where it has no place for one."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"no place for the table: the lines {BEGIN} and {END} are needed once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{flags_table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file whose table to renew")
    path = parser.parse_args().file
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
