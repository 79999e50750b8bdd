"""JSON read strictly, because a lenient parser trains what nobody wrote, and the error that a bad row becomes."""

import json
import math
from typing import Any, NoReturn

from dataset.errors import RowError


def parse_object(text: str) -> dict[str, Any]:
    row = parse_json(text)
    if not isinstance(row, dict):
        raise RowError("NOT_OBJECT", f"each line must hold one JSON object, this one holds {kind_of(row)}")
    return row


def parse_json(text: str) -> Any:
    """Strict JSON: no key twice, no NaN, no half of a surrogate pair; raises RowError."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RowError:
        raise
    except UnicodeEncodeError as error:
        raise RowError("UTF8", "an escape spells half of a surrogate pair, which is no character") from error
    except json.JSONDecodeError as error:
        raise RowError("JSON_SYNTAX", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("JSON_SYNTAX", "nested too deeply") from error
    except ValueError as error:  # Python's own limit on the digits of an integer
        raise RowError("JSON_SYNTAX", "an integer has too many digits") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError("DUPLICATE_KEY", f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return row


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _refuse_constant(text: str) -> NoReturn:
    raise RowError("NON_FINITE", f"{text[:40]} is no finite number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def kind_of(value: Any) -> str:
    """The JSON type of a value, for a message."""
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), "a number")
