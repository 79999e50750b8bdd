"""Secrets of the environment stay there: nothing that a run writes holds them, in whatever spelling."""

import base64
import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.small_world import TINY, write_rows

ROOT = Path(__file__).resolve().parent.parent.parent
SECRETS = {
    "HF_TOKEN": "hf_cAnArYofTheHubTokenAbcdefghijklmn",
    "HUGGING_FACE_HUB_TOKEN": "hf_cAnArYofTheOldTokenAbcdefghijklmn",
    "WANDB_API_KEY": "cafe0123456789abcdef0123456789abcdefcafe",
}


def spellings(secret):
    """The secret as it is, quoted, backwards, in hex and in base64, wherever in a text it begins there."""
    plain = secret.encode()
    coded = [base64.b64encode(b"x" * shift + plain)[4 if shift else 0 : -4] for shift in range(3)]
    return {plain, plain[::-1], plain.hex().encode(), quote(secret).encode(), *coded}


def contents_of(path):
    """What a file says, also inside an archive."""
    content = path.read_bytes()
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def leaks_in(directory):
    """`file: NAME` for each secret in a file below the directory or in its name."""
    leaks = []
    for path in sorted(directory.rglob("*")):
        texts = [str(path).encode(), *(contents_of(path) if path.is_file() else ())]
        leaks += [
            f"{path}: {name}"
            for name, secret in SECRETS.items()
            if any(spelling in text for text in texts for spelling in spellings(secret))
        ]
    return leaks


@pytest.mark.parametrize("name", SECRETS)
def test_the_search_finds_what_is_there(name, tmp_path):
    secret = SECRETS[name]
    texts = [f"token={secret}\n".encode(), secret[::-1].encode(), secret.encode().hex().encode()]
    texts += [base64.b64encode(b"abc"[:shift] + b"user:" + secret.encode()) for shift in range(3)]
    texts += [gzip.compress(secret.encode())]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}").write_bytes(text)
    with zipfile.ZipFile(tmp_path / "archive", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.txt", secret)
    (tmp_path / f"wandb-{secret}").mkdir()
    assert len(leaks_in(tmp_path)) == len(texts) + 2


def test_a_run_writes_no_secret_anywhere(tmp_path):
    """A whole run with wandb, one that fails on its data and one that asks the Hub: files, caches, home and output."""
    home = tmp_path / "home"
    home.mkdir()
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "bad.jsonl").write_text("no json\n")
    environment = {
        **os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1",
        **dict.fromkeys(("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(home)),
    }  # fmt: skip
    flags = {**TINY, "max_steps": 2, "cache_dir": tmp_path / "cache", "data_path": rows, "use_wandb": 1}
    changes = {"good": {}, "bad": {"data_path": tmp_path / "bad.jsonl"}, "hub": {"tokenizer": "owner/name"}}
    runs = {}
    for name, changed in changes.items():
        words = {**flags, **changed, "save_dir": tmp_path / name}.items()
        command = [sys.executable, "train_full_sft.py", *(f"--{flag}={value}" for flag, value in words)]
        with (tmp_path / f"{name}.log").open("wb") as log:
            runs[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    codes = {name: process.wait(120) for name, process in runs.items()}
    assert codes == {"good": 0, "bad": 65, "hub": 2}, (tmp_path / "good.log").read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and (tmp_path / "good" / "final").is_dir()
    assert not leaks_in(tmp_path)
