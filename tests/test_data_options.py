"""Options of reading data that came later: what they do, what they refuse, and that older stores keep their names."""

import json

import pytest

from dataset.prepare import DataOptions, prepare
from dataset.reader import Conversation
from dataset.system_prompts import system_as_user
from model.build import OWN_TOKENIZER, load_tokenizer
from scripts.chat import main as chat
from scripts.evaluate import main as evaluate
from tests.small_world import export_learnt, log_of, train, write_rows
from training.config import make_config
from training.config.flags import ConfigError

NEW = {"text_tokens": ("<think>",), "vanished": "warn", "system_as": "user"}


def message(role, content):
    return {"role": role, "content": content}


TALK = [message("system", "Be short."), message("user", "Hi\n"), message("assistant", "Yo"), message("user", "?")]
ROW = json.dumps({"messages": [*TALK, message("assistant", "!")]})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(OWN_TOKENIZER))


@pytest.fixture
def store_of(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW + "\n", encoding="utf-8")

    def make(tokenizer=tokenizer, **options):
        return prepare(path, tokenizer, DataOptions(**options), tmp_path / "cache", echo=lambda _: None)

    return make


def test_each_option_makes_a_store_of_its_own_and_a_day_only_where_it_is_written(store_of):
    plain = store_of(max_seq_len=64).directory.name
    assert store_of(max_seq_len=64, template_date="2026-01-30").directory.name == plain
    others = {store_of(max_seq_len=64, **{name: value}).directory.name for name, value in NEW.items()}
    assert len(others) == 3 and plain not in others


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("text_tokens", ("<think>", " "), "has a blank token"),
        ("vanished", "skip", "vanished='skip' must be one of error, warn"),
        ("system_as", "first", "system_as='first' must be one of system, user"),
        ("template_date", "20260130", "template_date='20260130' must be a day, YYYY-MM-DD"),
        ("template_date", "2026-02-30", "template_date='2026-02-30' must be a day"),
    ],
)
def test_a_value_that_means_nothing_is_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**{option: value})


def test_flags_become_options():
    flags = {"text_tokens": "<think>, </think>", "vanished": "warn", "template_date": "2026-01-30", "system_as": "user"}
    options = DataOptions(**make_config(flags).data_options)
    assert options.text_tokens == ("<think>", "</think>")
    assert (options.vanished, options.template_date, options.system_as) == ("warn", "2026-01-30", "user")
    assert make_config({"text_tokens": ["<a>", "<b>"]}).data_options["text_tokens"] == ("<a>", "<b>")  # of a YAML file
    assert DataOptions(**make_config({}).data_options).text_tokens == ()


def test_wrong_flags_are_told_together():
    with pytest.raises(ConfigError) as caught:
        make_config({"text_tokens": "<a>,,<b>", "template_date": "30.1.2026"})
    assert caught.value.problems == [
        "--text_tokens <a>,,<b>: a name between two commas is blank",
        "--template_date 30.1.2026: write a day as YYYY-MM-DD",
    ]


def test_a_system_message_goes_before_the_first_question():
    whole = Conversation(7, TALK, tools=[{"name": "clock"}], wishes={2: False, 3: True})
    moved = system_as_user(whole)
    assert moved.messages == [message("user", "Be short.\n\nHi\n"), *TALK[2:]]
    assert (moved.line, moved.tools, moved.wishes) == (7, whole.tools, {1: False, 2: True})
    assert whole.messages == TALK and TALK[1]["content"] == "Hi\n"  # the row itself is left alone
    blank = system_as_user(Conversation(1, [message("system", " \n"), *TALK[1:]]))
    assert blank.messages == TALK[1:]


def test_what_has_no_system_message_stays_the_same_object():
    for conversation in (Conversation(1, TALK[1:], wishes={1: True}), Conversation(1, [], text="System: no")):
        assert system_as_user(conversation) is conversation


def test_a_template_that_raises_on_a_system_message_is_trained_with_it(store_of, tokenizer):
    strict = load_tokenizer(str(OWN_TOKENIZER))
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict.chat_template = refusal + tokenizer.chat_template
    with pytest.raises(ValueError, match="no system role"):
        store_of(strict)
    ids, supervised = store_of(strict, system_as="user").tokens(0)
    assert strict.decode(ids).startswith("<|im_start|>user\nBe short.\n\nHi\n<|im_end|>\n<|im_start|>assistant\nYo")
    assert strict.decode(ids[supervised]) == "Yo<|im_end|>!<|im_end|>"


def test_a_prompt_for_rows_without_one_moves_too(tmp_path):
    rows, prompts = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "prompts.txt"
    prompts.write_text("Be brief.\n")
    flags = {"data_path": str(rows), "system_prompts": str(prompts), "system_prompt_ratio": 1.0, "max_seq_len": 128}
    assert train(1, tmp_path / "run", **flags, system_as="user", dry_run=True) == [0], log_of(tmp_path / "run")
    assert "<|im_start|>user\nBe brief.\n\nSay 0" in (log := log_of(tmp_path / "run"))
    assert "<|im_start|>system" not in log


def test_a_model_is_asked_as_it_was_trained(tmp_path, capsys):
    export_learnt(tmp_path / "final", [[message("user", "Be short.\n\nHi"), message("assistant", "Yo")]])
    words = [str(tmp_path / "final"), "--device", "cpu"]
    assert chat([*words, "--system", "Be short.", "--system_as", "user", "--prompt", "Hi"]) == 0
    assert capsys.readouterr().out == "Yo\n"
    talk = [message("system", "Be short."), message("user", "Hi"), message("assistant", "Yo")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    words += ["--data_path", str(tmp_path / "rows.jsonl"), "--cache_dir", str(tmp_path / "cache")]
    assert evaluate([*words, "--system_as", "user", "--text_tokens", "<think>", "--vanished", "warn"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["exact_match"] == 1
    assert evaluate([*words, "--text_tokens", "<think>,"]) == 2
