"""What inspect_data shows is what will be trained, and text of a data file stays text in its page."""

import json
import re

import pytest

from scripts.inspect_data import main

ROWS = [
    ("Say <script>alert(1)</script>", "one & two"),
    ("你好", "你好，世界"),
    ("Say three", "three"),
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in ROWS)
    path.write_text(text + '{"prompt": "no answer"}\n')
    return path


@pytest.fixture
def inspect(tmp_path, rows, capsys):
    def call(*flags):
        words = ["--data_path", str(rows), "--cache_dir", str(tmp_path / "cache"), "--max_seq_len", "64", *flags]
        code = main(words)
        return code, *capsys.readouterr()

    return call


def test_samples_are_shown_with_their_mask_and_the_ledger(inspect, rows):
    code, out, err = inspect("--bad_rows", "skip")
    assert code == 0 and "prompt and completion" in err
    for line, (_, answer) in enumerate(ROWS, start=1):
        assert f"--- {rows}:{line}: " in out
        assert f"\x1b[32m{answer}<|im_end|>\x1b[0m" in out
    assert re.search(r"rows read +4\n", out) and re.search(r"rows rejected +1\n", out)
    assert "1 MISSING_FIELD" in out and "p90" in out and re.search(r"efficiency +0\.\d+", out)


def test_a_line_can_be_asked_for_and_its_tokens(inspect, rows):
    code, out, _ = inspect("--bad_rows", "skip", "--line", "2", "--ids")
    assert code == 0 and out.count("--- ") == 1 and f"{rows}:2" in out
    listed = re.findall(r"^ +(\d+) ([+ ]) (.*)$", out, flags=re.MULTILINE)
    assert "".join(unquoted(text) for _, sign, text in listed if sign == "+").endswith("<|im_end|>")
    assert listed[0][2] == "'<|im_start|>'"
    code, _, err = inspect("--bad_rows", "skip", "--line", "4")
    assert code == 2 and "--line 4: no sample was made from it" in err and "MISSING_FIELD" in err


def unquoted(shown: str) -> str:
    return shown[1:-1]


def test_the_page_holds_text_and_nothing_that_runs(inspect, tmp_path):
    page = tmp_path / "samples.html"
    code, out, _ = inspect("--bad_rows", "skip", "--html", str(page), "--ids")
    text = page.read_text(encoding="utf-8")
    assert code == 0 and f"samples: {page}" in out
    assert "<script" not in text and "Say &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<mark>one &amp; two&lt;|im_end|&gt;</mark>" in text
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def test_the_histogram_is_a_picture(inspect, tmp_path):
    code, _, _ = inspect("--bad_rows", "skip", "--histogram", str(tmp_path / "lengths.png"))
    assert code == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_errors_have_the_exit_codes_of_the_trainer(inspect, tmp_path, capsys):
    code, _, err = inspect()
    assert code == 65 and "rows.jsonl:4: MISSING_FIELD" in err
    assert inspect("--bad_rows", "skip", "--html", str(tmp_path / "none" / "x.html"))[0] == 74
    with pytest.raises(SystemExit) as caught:
        inspect("--max_seq_length", "64")
    assert caught.value.code == 2 and "did you mean --max_seq_len" in capsys.readouterr().err
