"""Trains the byte-level BPE of model/tokenizer on the demo data and on given texts.

The merges are learnt with every digit a word of its own, so that arithmetic always sees single digits; the saved file
names the plain byte-level split instead. Both cut a text into the same tokens, because no merge holds a digit, and the
plain one is what other runtimes know as the "gpt-2" pre-tokenizer.

The shipped files come from 13,838 paragraphs of Python's documentation (English, Chinese), GSM8K and tool dialogues:

    python -m scripts.train_tokenizer --out model/tokenizer --text en.txt zh.txt gsm8k/train.jsonl sgd/train.jsonl
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.demo import training_conversations
from dataset.errors import RowError
from dataset.raw_rows import read_rows
from dataset.sources import find_sources

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding, start of a turn, end of a turn
TAG_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
DEMO_STRIDE = 8
TEMPLATE = Path(__file__).resolve().parent.parent / "model" / "tokenizer" / "chat_template.jinja"
MODEL_MAX_LENGTH = 32768  # tokens; only a warning threshold of transformers, the model sets the true limit


def demo_texts() -> Iterator[str]:
    """A few rows are enough for the words; more would spend the small vocabulary on our templates."""
    for row in training_conversations()[::DEMO_STRIDE]:
        for message in row["messages"]:
            yield message["content"]


def file_texts(word: str) -> Iterator[str]:
    """The lines of a .txt or .md file; of any data that the trainer reads, the strings of each row, the rest as JSON.

    Raises ValueError for a row that cannot be read.
    """
    if word.endswith((".txt", ".md")):
        with open(word, encoding="utf-8") as lines:
            yield from lines
        return
    for source in find_sources(word, "--text"):
        for line, row in read_rows(source.path):
            if isinstance(row, RowError):
                raise ValueError(f"{source.path}:{line}: {row.code} {row}")
            for value in row.values():
                yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly vocab_size entries (named tokens, bytes, merges); ValueError if the text is too small."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL_TOKENS + TAG_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"--vocab_size {vocab_size}: the text yields only {tokenizer.get_vocab_size()} entries")
    learnt = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    shipped = Tokenizer(models.BPE(vocab=learnt["vocab"], merges=merges))
    shipped.pre_tokenizer = plain
    shipped.decoder = decoders.ByteLevel()
    shipped.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    # Not special, so that decoding for a reader keeps a tool call and the reasoning in sight.
    shipped.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAG_TOKENS])
    return shipped


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and beside them our chat template, which is written by hand."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (directory / TEMPLATE.name).exists():
        shutil.copyfile(TEMPLATE, directory / TEMPLATE.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the byte-level BPE tokenizer on the demo data and given texts.")
    parser.add_argument(
        "--text", nargs="*", default=[], metavar="NAME", help="text files (.txt, .md), or data as for --data_path"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the tokenizer and its chat template")
    parser.add_argument("--vocab_size", type=int, default=6400, help="entries, special tokens and bytes included")
    options = parser.parse_args(arguments)
    try:
        texts = (text for source in [demo_texts(), *map(file_texts, options.text)] for text in source)
        tokenizer = train(texts, options.vocab_size)
        save(tokenizer, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 74
    print(f"{options.out / 'tokenizer.json'}: {tokenizer.get_vocab_size()} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
