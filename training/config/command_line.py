"""From a command line and YAML files to a configuration: defaults < base files < file < command line.

This module imports neither torch nor transformers: `--help` must be instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from training.config.config import Config, field_types, make_config, overlay, unknown_flag
from training.config.flags import ConfigError
from training.config.yaml_files import read_yaml

DEMO_CONFIG = "configs/demo.yaml"
TRAINER = "train_full_sft.py"


def build_parser(prog: str = TRAINER) -> argparse.ArgumentParser:
    """The command line, one flag per field; values stay text here and are converted together later."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune a language model. Runs under torchrun and as plain python; without arguments it trains "
        f"the embedded demo ({DEMO_CONFIG}).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line wins")
    parser.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    groups: dict[str, argparse._ArgumentGroup] = {}
    types = field_types()
    for f in dataclasses.fields(Config):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        plain, _ = types[f.name]
        text = f.metadata["help"].replace("%", "%%")
        if f.default is not None and f.default != "":
            text += f" (default {int(plain(f.default)) if plain is bool else f.default})"
        metavar = {bool: "0|1", int: "N", float: "X", str: "|".join(f.metadata["choices"]) or "TEXT"}[plain]
        # Flags of 0/1 also work bare; --from_resume is one of them although it takes a path too.
        bare: dict[str, Any] = {"nargs": "?", "const": "1"} if plain is bool or f.name == "from_resume" else {}
        groups[title].add_argument(f"--{f.name}", metavar=metavar, help=text, default=argparse.SUPPRESS, **bare)
    return parser


def parse_config(argv: list[str], prog: str = TRAINER) -> tuple[Config, bool]:
    """The configuration of a command line, and whether only printing was asked for. Exits on --help."""
    known, unknown = build_parser(prog).parse_known_args(argv)
    given = vars(known)
    path, only_print = given.pop("config"), given.pop("print_config")
    if path is None and "data_path" not in given:
        path = str(Path(__file__).resolve().parent.parent.parent / DEMO_CONFIG)
    problems = []
    values: dict[str, Any] = {}
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    problems += [unknown_flag(word.lstrip("-")) for word in flags] or [f"unexpected word {word!r}" for word in unknown]
    try:
        values = read_yaml(path) if path else {}
    except ConfigError as error:
        problems += error.problems
    try:
        config = make_config(overlay(values, given))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config, only_print


def config_from_command_line(argv: list[str] | None = None, prog: str = TRAINER) -> Config:
    """The configuration of this process; prints all problems and exits with 2, or what was asked for and with 0."""
    try:
        config, only_print = parse_config(sys.argv[1:] if argv is None else argv, prog)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
            print("see python train_full_sft.py --help", file=sys.stderr)
        sys.exit(2)
    if only_print:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config
