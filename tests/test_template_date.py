"""A chat template that writes the date writes one date in a run, whenever the run goes on."""

import json
import os
import time
from datetime import datetime

import psutil
import pytest

from dataset.prepare import DataOptions, prepare
from dataset.tokenizer import launched_at, template_day
from model.build import OWN_TOKENIZER, load_tokenizer
from scripts.evaluate import day_of_run
from scripts.inspect_data import main as inspect_data
from tests.small_world import log_of, result_of, resume_from, train, write_rows
from tests.test_chat import byte_tokenizer
from training.config import Config
from training.config.flags import ConfigError
from training.run.directory import Start, with_day

OWN = (OWN_TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8")
DATED = "{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + OWN
FIRST, SECOND = "2026-01-30", "2026-01-31"


def at_noon(day):
    return lambda: datetime.fromisoformat(f"{day} 12:00").timestamp()


def test_only_a_template_that_writes_the_day_has_one(monkeypatch):
    monkeypatch.setattr("dataset.tokenizer.launched_at", at_noon(FIRST))
    days = {
        template: (template_day(byte_tokenizer(template)), template_day(byte_tokenizer(template), SECOND))
        for template in (DATED, OWN, None)
    }
    assert days == {DATED: (FIRST, SECOND), OWN: (None, None), None: (None, None)}
    several = byte_tokenizer({"default": OWN, "tool_use": DATED})
    assert template_day(several) == FIRST


def test_the_processes_of_torchrun_take_the_day_of_its_start(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert abs(launched_at() - time.time()) < 5
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launched_at() == psutil.Process(os.getppid()).create_time()


def test_a_store_is_of_its_day(tmp_path, monkeypatch):
    rows, tokenizer = write_rows(tmp_path / "rows.jsonl", 2), load_tokenizer(str(OWN_TOKENIZER))
    tokenizer.chat_template = DATED

    def text_of(day=None):
        store = prepare(rows, tokenizer, DataOptions(template_date=day), tmp_path / "cache", echo=lambda _: None)
        return tokenizer.decode(store.tokens(0)[0]).split("<|im_end|>")[0], store.directory

    monkeypatch.setattr("dataset.tokenizer.launched_at", at_noon(FIRST))
    today, named = text_of(), text_of(SECOND)
    assert today[0].endswith("Today is 30 Jan 2026") and named[0].endswith("Today is 31 Jan 2026")
    monkeypatch.setattr("dataset.tokenizer.launched_at", at_noon(SECOND))
    assert text_of() == named and text_of(FIRST) == today != named


def place_checkpoints(run, **days):
    """Checkpoints of this run that say no more than the day; None: of a version that knew none."""
    for name, day in days.items():
        path = run / "checkpoints" / f"step-{name.removeprefix('step').rjust(8, '0')}"
        path.mkdir(parents=True)
        settings = {} if day is None else {"template_date": day}
        (path / "trainer_state.json").write_text(json.dumps({"config": settings}))
    return path


RESUMES = Start(resumes=True, continues=True)


def day_at(run, start, named=None, writes=True):
    """The day that a run is given, with today SECOND, and what is said of it."""
    said = []
    config = Config(save_dir=str(run), template_date=named)
    config = with_day(config, start, lambda day: (day or SECOND) if writes else None, said.append)
    return config.template_date, *said


def test_a_run_keeps_the_day_of_its_first_start(tmp_path):
    place_checkpoints(tmp_path / "run", step2=FIRST, step4=FIRST)
    line = "the chat template writes the date: {} in all samples (--template_date names another)"
    assert day_at(tmp_path / "run", RESUMES) == (FIRST, line.format(FIRST))
    assert day_at(tmp_path / "run", RESUMES, named="2026-02-01")[0] == "2026-02-01"
    assert day_at(tmp_path / "run", Start(clears=True)) == (SECOND, line.format(SECOND))
    assert day_at(tmp_path / "new", RESUMES)[0] == SECOND
    branch = Start(resumes=True, checkpoint=tmp_path / "run" / "checkpoints" / "step-00000002")
    assert day_at(tmp_path / "new", branch)[0] == FIRST


def test_a_template_without_a_date_records_none(tmp_path):
    place_checkpoints(tmp_path / "run", step2=FIRST)
    assert day_at(tmp_path / "run", RESUMES, writes=False) == (None,)
    said = f"--template_date {FIRST} does nothing: the chat template writes no date"
    assert day_at(tmp_path / "run", RESUMES, FIRST, writes=False) == (None, said)


def test_checkpoints_that_say_nothing_of_a_day_are_no_trouble(tmp_path):
    older = place_checkpoints(tmp_path / "older", step2=None)
    assert day_at(tmp_path / "older", RESUMES)[0] == SECOND
    for damage in ("{", "[]", '{"config": 3}', '{"loop": {}}', "[" * 100_000):
        (older / "trainer_state.json").write_text(damage)
        assert day_at(tmp_path / "older", RESUMES)[0] == SECOND
    newest = place_checkpoints(tmp_path / "torn", step2=FIRST, step10=FIRST)
    assert newest.name == "step-00000010"
    (newest / "trainer_state.json").unlink()
    assert day_at(tmp_path / "torn", RESUMES)[0] == FIRST
    place_checkpoints(tmp_path / "forged", step2=["x"])
    with pytest.raises(ConfigError, match="--template_date .'x'.: write a day as YYYY-MM-DD"):
        day_at(tmp_path / "forged", RESUMES)


def test_a_run_goes_on_with_the_date_that_it_began_with(tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    flags = {
        "data_path": str(write_rows(tmp_path / "rows.jsonl", 8)), "chat_template": str(template), "epochs": 1,
        "batch_size": 2, "max_seq_len": 128,
    }  # fmt: skip
    whole = tmp_path / "whole"
    assert train(2, whole, **flags, template_date=FIRST) == [0, 0], log_of(whole)
    assert f"template_date: '{FIRST}'" in (whole / "config.yaml").read_text()
    assert log_of(whole).count("the chat template writes the date") == 1 and "date" not in log_of(whole, rank=1)

    copy = resume_from(whole, 1, tmp_path / "copy")  # no flag: today, which is another day
    assert train(2, copy, **flags, from_resume="1") == [0, 0], log_of(copy)
    assert f"writes the date: {FIRST} in all samples" in log_of(copy)
    assert result_of(copy) == result_of(whole)

    copy = resume_from(whole, 1, tmp_path / "other")
    assert train(1, copy, **flags, from_resume="1", template_date=SECOND) == [2]
    assert "data: the checkpoint has" in log_of(copy) and "template: " not in log_of(copy)

    assert day_of_run(whole / "final") == FIRST and day_of_run(whole) is None


def test_the_day_of_the_first_start_is_recorded_and_used_by_scripts(tmp_path, capsys):
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    flags = {"data_path": str(write_rows(tmp_path / "rows.jsonl", 8)), "chat_template": str(template), "max_steps": 1}
    before, run = datetime.now().date(), tmp_path / "run"
    assert train(1, run, **flags, max_seq_len=128) == [0], log_of(run)
    day = day_of_run(run / "final")
    assert day in (before.isoformat(), datetime.now().date().isoformat())
    settings = (run / "config.yaml").read_text().replace(day, FIRST)
    (run / "config.yaml").write_text(settings)
    assert inspect_data(["--config", str(run / "config.yaml"), "--samples", "1"]) == 0
    assert "Today is 30 Jan 2026" in capsys.readouterr().out
    for text in ("template_date: 2026-01-30", "template_date: soon", "- 1", "{"):  # not as a run writes it
        (run / "config.yaml").write_text(text)
        assert day_of_run(run / "final") is None
