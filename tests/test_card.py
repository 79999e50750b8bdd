"""The card of an exported model is what the Hub reads, and holds the ledger, the scores and every setting."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from model.card import model_card
from training.config import make_config

SOURCE = {
    "path": "a|b\n.jsonl", "rows_read": 12, "rows_kept": 11, "rows_rejected": 1, "samples": 13, "tokens": 1400,
    "supervised_tokens": 150,
}  # fmt: skip
HELD_OUT = {**SOURCE, "path": "test.jsonl", "rows_read": 7}
REPORT = {
    "train": {"samples": 13, "tokens": 1400, "supervised_share": 0.1071, "sources": [SOURCE]},
    "held_out": {"sources": [HELD_OUT]},
}
CONFIG = vars(make_config({"seed": 9, "learning_rate": 5e-4, "data_path": "a|b\n.jsonl"}))


def head_of(card: str) -> dict:
    """What stands before the text, read as the Hub reads it."""
    return ModelCard(card).data.to_dict()


def test_the_head_is_what_the_hub_knows():
    card = model_card(CONFIG, REPORT, {}, 40)
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert card.startswith("---\n") and head_of(card) == {**expected, "tags": ["conversational", "sft", "full-sft"]}
    assert not re.search("license|base_model", card.split("---")[1])  # neither is known
    assert ModelCard(card).text.lstrip().startswith("# A chat model, trained from scratch")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "openai-community/gpt2"])
def test_a_base_of_the_hub_is_named_for_it(name):
    card = model_card({**CONFIG, "from_weight": name}, REPORT, {}, 40)
    assert head_of(card)["base_model"] == name and f"fine-tuned from `{name}`" in card


def test_a_base_on_this_disk_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    for name in ("runs/x", str(tmp_path / "gone")):
        assert "base_model" not in head_of(model_card({**CONFIG, "from_weight": name}, REPORT, {}, 40))


def test_the_ledger_and_the_scores_are_tables():
    card = model_card(CONFIG, REPORT, {"eval/loss": 0.04741, "eval/token_accuracy": 0.9941}, 40)
    assert "| part | source | rows read | rows kept | rows rejected | samples | tokens | supervised tokens |" in card
    assert "| train | `a\\|b .jsonl` | 12 | 11 | 1 | 13 | 1400 | 150 |" in card
    assert "| held out | `test.jsonl` | 7 | 11 | 1 | 13 | 1400 | 150 |" in card
    assert "| eval loss | 0.0474 |\n| eval token accuracy | 0.9941 |" in card
    alone = model_card(CONFIG, {**REPORT, "held_out": None}, {}, 40)
    assert "## Scores" not in alone and "| train | " in alone and "| held out | " not in alone
    assert "| steps | 40 |" in card and "| seed | 9 |" in card


def test_the_settings_train_it_again():
    (settings,) = re.findall("```yaml\n(.*?)```", model_card(CONFIG, REPORT, {}, 40), flags=re.DOTALL)
    assert vars(make_config(yaml.safe_load(settings))) == CONFIG
    elsewhere = {**CONFIG, "save_dir": "/else", "cache_dir": "/where", "from_resume": "1", "overwrite": True}
    assert model_card(elsewhere, REPORT, {}, 40) == model_card(CONFIG, REPORT, {}, 40)
