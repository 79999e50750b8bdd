"""What one flag is: its help, its bounds, and how text becomes its value; config.py beside it lists them all."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import field
from datetime import date
from typing import Any

AUTO = 0  # a batch size that is found before the first step
INTERVAL = re.compile(r"[1-9]\d*(epoch)?")


class ConfigError(ValueError):
    """Every problem of a configuration, one per line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def flag(
    default: Any, help: str, *, group: str, choices: tuple[str, ...] = (), minimum: float | None = None,
    maximum: float | None = None, above: float | None = None, interval: bool = False, mapping: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that is also a command line flag.

    `above` is an exclusive lower bound; a text with `mapping` may stand in YAML as a mapping of names to values.
    """
    kinds = {"choices": choices, "interval": interval, "mapping": mapping}
    bounds = {"minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata={"help": help, "group": group, **kinds, **bounds})


def convert(name: str, value: Any, plain: type, optional: bool, mapping: bool = False) -> Any:
    """The value in the field's type; text from the command line and scalars from YAML alike. Raises ValueError."""
    off = ("none", "0", 0) if name == "plot_interval" else ("none",)
    if value is None or (optional and value in off):
        if optional:
            return None
        raise ValueError(f"--{name} needs a value")
    text = str(value).strip()
    if plain is bool:
        if text.lower() in ("1", "true", "yes"):
            return True
        if text.lower() in ("0", "false", "no"):
            return False
        raise ValueError(f"--{name} {value}: not 0 or 1")
    if name == "batch_size" and text == "auto":
        return AUTO
    if plain is str:
        if name == "stages" and isinstance(value, list):
            return json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, list) and all(type(item) in (str, int) for item in value):
            value = [str(item) for item in value]
            if torn := next((item for item in value if "," in item), None):
                raise ValueError(f"--{name}: the comma in {torn!r} separates names, rename the file")
            return ",".join(value)
        if mapping and isinstance(value, dict):
            return ", ".join(f"{key}={item}" for key, item in value.items())
        if isinstance(value, (list, dict)):
            raise ValueError(f"--{name} {value}: not a single value")
        return str(int(value)) if isinstance(value, bool) else str(value)
    try:
        if plain is int and isinstance(value, str) and not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError
        if isinstance(value, bool) or (isinstance(value, float) and plain is int and value != int(value)):
            raise ValueError
        return plain(value)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if plain is int else "a number"
        raise ValueError(f"--{name} {value}: not {kind}") from None


def field_problems(f: dataclasses.Field[Any], value: Any) -> list[str]:
    m = f.metadata
    if value is None:
        return []
    if m["choices"] and value not in m["choices"]:
        return [f"--{f.name} {value}: not one of {', '.join(m['choices'])}"]
    if m["interval"] and not INTERVAL.fullmatch(value):
        return [f"--{f.name} {value}: write N (steps) or Nepoch, N a whole number from 1"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"--{f.name} {value}: not a finite number"]
    if m["minimum"] is not None and value < m["minimum"]:
        return [f"--{f.name} {value}: must be at least {m['minimum']}"]
    if m["above"] is not None and value <= m["above"]:
        return [f"--{f.name} {value}: must be greater than {m['above']}"]
    if m["maximum"] is not None and value > m["maximum"]:
        return [f"--{f.name} {value}: must be at most {m['maximum']}"]
    return []


def is_day(text: str) -> bool:
    """Whether a text is a day of the calendar, written YYYY-MM-DD."""
    with contextlib.suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text  # which can be written in other ways too
    return False


def did_you_mean(name: str, known: Iterable[str], dashes: str = "") -> str:
    """The nearest known name in brackets, nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
