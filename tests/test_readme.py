"""What the texts promise: every flag with its default, in both languages, and commands that exist."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from scripts.flags_table import with_table
from training.config import Config

ROOT = Path(__file__).resolve().parent.parent
README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"


def test_the_table_of_flags_is_that_of_the_program():
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "renew it: python -m scripts.flags_table README.md"
    assert with_table(text.replace("`--epochs`", "`--epoch`")) == text


def test_the_chinese_table_has_every_flag_with_its_default():
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|", CHINESE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    expected = {}
    for f in dataclasses.fields(Config):
        default = int(f.default) if isinstance(f.default, bool) else f.default
        expected[f.name] = "" if default in (None, "") else f"`{default}`"
    assert rows == expected


@pytest.mark.parametrize("path", [README, CHINESE], ids=["English", "Chinese"])
def test_what_the_text_names_exists(path):
    text = path.read_text(encoding="utf-8")
    scripts = set(re.findall(r"-m (scripts\.\w+)", text))
    files = set(re.findall(r"(?:bash|config|python) ((?:scripts|configs)/[\w.]+|\w+\.py)", text))
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}
    assert {"scripts.chat", "scripts.evaluate"} <= scripts and "scripts/quickstart.sh" in files
    missing = [script for script in scripts if importlib.util.find_spec(script) is None]
    missing += [name for name in files | links if not (ROOT / name).exists()]
    assert not missing
    assert "@@" not in text


def test_both_languages_show_the_same_commands():
    def blocks(path):
        found = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        return [re.sub(r" *#.*", "", block) for block in found]

    assert blocks(README) == blocks(CHINESE)


def test_every_code_of_a_bad_row_is_documented_and_no_other():
    written = set()
    for path in (ROOT / "dataset").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        written |= set(re.findall(r'(?:RowError|Defect)\(\s*(?:str\(\w+\), \w+, )?"([A-Z0-9_]+)"', text))
    documented = re.findall(
        r"^\| `([A-Z0-9_]+)` \|", (ROOT / "docs" / "data.md").read_text("utf-8"), flags=re.MULTILINE
    )
    assert sorted(documented) == sorted(written)
