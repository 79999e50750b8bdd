"""What is wrong with data: a row, a file, all of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Defect:
    """A row that was refused; line counts from 1, and 0 speaks of the whole file."""

    path: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.code} {self.message}"


class DataError(ValueError):
    """The data cannot be trained as asked; shows the first twenty defects that stand in the way, and where all are.

    `every` also holds the rows that the options leave out.
    """

    exit_code = 65

    SHOWN = 20

    def __init__(self, defects: list[Defect], file: Path | None = None, every: list[Defect] | None = None):
        self.defects, self.every = defects, every or defects
        lines = [str(defect) for defect in defects[: self.SHOWN]]
        hidden = f", {len(defects) - self.SHOWN} of them not shown" if len(defects) > self.SHOWN else ""
        place = f"; {file} has all of them" if file else ""
        count = f"{len(defects)} defect{'s' * (len(defects) > 1)} in the data"
        too_long = any(defect.code == "OVERLONG" for defect in defects)
        way = "; --overlong drop or truncate, or a larger --max_seq_len, deals with what is too long" * too_long
        super().__init__("\n".join([*lines, f"{count}{hidden}{place}{way}"]))


class UnsafeDataError(ValueError):
    """A chat template that leaves its sandbox or its limits, or a list of files that reaches outside its directory."""

    exit_code = 77


class RowError(ValueError):
    """One row cannot be trained; `code` is the stable word that reports and tests go by."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, (self.code, str(self))
