"""Measures an exported model on conversations with known answers: `python -m scripts.evaluate runs/full_sft`.

The model answers the last turn of each conversation greedily; an answer counts when its whole text is as expected.
Prompts are cut out of the token store that training and validation read, so they are what training would have shown.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import time
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dataset.formats import LAYOUTS
from dataset.raw_rows import read_rows
from dataset.reader import BAD_ROWS, OVERLONG, SYSTEM_AS, VANISHED
from model.trust import Trust
from training.config import Config
from training.config.flags import is_day
from training.config.yaml_files import parse_yaml
from training.control.exit_codes import exit_code_of
from training.disk import replace_json
from training.records.metrics import strict

NUMBER = re.compile(r"(?:(?<![0-9])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
ROW_TOKENS = 4096  # of a row when the loss is measured, unless one sample is longer


class Case(NamedTuple):
    """A conversation up to its last answer, what is expected there, and the token that ends it."""

    sample: int
    family: str
    prompt: list[int]
    expected: list[int]
    end: int


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__.split(":")[0] + ".")
    flag = parser.add_argument
    flag("directory", metavar="DIR", type=Path, help="exported model (runs/x/final) or run (runs/x)")
    flag("--data_path", metavar="FILE", default="demo", help="JSONL file, or 'demo': the held-out part of it (default)")
    for name in ("prompt_field", "response_field", "system_field"):
        flag(f"--{name}", metavar="NAME", help=f"name of the {name.replace('_', ' ')} in rows without messages")
    for name, choices in (
        ("data_format", ("auto", *LAYOUTS)), ("bad_rows", BAD_ROWS), ("overlong", OVERLONG), ("vanished", VANISHED),
        ("system_as", SYSTEM_AS),
    ):  # fmt: skip
        flag(f"--{name}", choices=choices, default=choices[0], help=f"as in training (default {choices[0]})")
    flag("--text_tokens", metavar="LIST", default="", help="as in training")
    flag("--chat_template", metavar="FILE", help="chat template instead of that in DIR: a Jinja file, or one of ours")
    flag("--limit", metavar="N", type=positive, help="only N conversations, spread evenly over the file")
    flag("--numbers", action="store_true", help="also compare the numbers that answers come to, as GSM8K ends with")
    flag("--max_new_tokens", metavar="N", type=positive, default=512, help="longest answer in tokens (default 512)")
    flag("--batch_size", metavar="N", type=positive, default=32, help="conversations answered at once (default 32)")
    flag("--out", metavar="FILE", type=Path, help="where to write the result (default evaluation.json in the run)")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA where there is one (default)")
    flag("--trust_remote_code", action="store_true", help="run the code that lies beside the weights")
    flag("--show", metavar="N", type=int, default=0, help="print N answers, spread evenly over the file")
    flag("--cache_dir", metavar="DIR", type=Path, default=Config.cache_dir, help="directory of the tokenised data")
    return parser.parse_args(argv)


def chat_tokenizer(directory: Path, chat_template: str | None, trust: Trust) -> Any:
    """The tokenizer of a directory with that template or its own. Raises ValueError where there is neither."""
    from model.build import TEMPLATE_HINT, load_tokenizer

    tokenizer = load_tokenizer(str(directory), chat_template, trust)
    if tokenizer.chat_template is None:
        raise ValueError(f"{directory} has no chat template: {TEMPLATE_HINT}")
    return tokenizer


def day_of_run(directory: Path) -> str | None:
    """The day that the chat template wrote in the run that a directory is of, where its config.yaml says so."""
    with contextlib.suppress(OSError, ValueError):
        settings = parse_yaml((directory.parent / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
        day = settings.get("template_date") if isinstance(settings, dict) else None
        return day if isinstance(day, str) and is_day(day) else None
    return None


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced: many files are sorted, and their first items speak for one kind only."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def read_cases(path: Path, store: Any, limit: int | None) -> list[Case]:
    """The last turn of each conversation in the token store of a file, under the `family` that its row names.

    Raises ValueError for a row that has no question, such as a plain text.
    """
    from dataset.questions import question_of

    last_of_row = {store.row(sample): sample for sample in range(store.num_samples)}
    rows = enumerate((row for _, row in read_rows(path)), start=1)
    families = {number: row.get("family") for number, row in rows if isinstance(row, dict) and number in last_of_row}
    cases = []
    for number, sample in spread(list(last_of_row.items()), limit or store.num_samples):
        question = question_of(sample, *store.tokens(sample))
        if question is None:
            raise ValueError(f"{store.where(sample)} has no question that could be answered")
        cases.append(Case(sample, str(families[number] or "all"), *question[1:]))
    return cases


def answer_all(model: Any, prompts: list[list[int]], longest: int, batch_size: int, ends: set[int]) -> list[Any]:
    """(ids of the greedy answer, whether it was cut) for each prompt; none outgrows the context of the model."""
    from model.build import known_positions
    from model.generate import generate

    results: dict[int, tuple[list[int], bool]] = {}
    context = known_positions(model) + 1  # the last new token is never read, so it takes no position
    rooms = [min(longest, context - len(prompt)) for prompt in prompts]
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths share a batch
    while waiting:
        room = rooms[waiting[0]]
        batch = [index for index in waiting[:batch_size] if rooms[index] == room]
        waiting = waiting[len(batch) :]
        answers = generate(model, [prompts[index] for index in batch], max_new_tokens=room, eos_token_ids=ends)
        results |= {index: (answer, len(answer) == room) for index, answer in zip(batch, answers, strict=True)}
        print(f"{len(results)} of {len(prompts)} answered", file=sys.stderr)
    return [results[index] for index in range(len(prompts))]


def held_out_means(model: Any, store: Any, samples: list[int], device: Any) -> dict[str, float]:
    """Loss (nats), perplexity and accuracy per supervised token, by the objective and the batches of training."""
    import numpy as np
    import torch

    from dataset.packing import plan_rows
    from dataset.rows import PackedRows, collate
    from model.losses import make_sft_objective
    from training.device import to_device
    from training.schedule.sums import Sums, token_means

    objective, sums, lengths = make_sft_objective(), Sums(), store.lengths[samples]
    rows = PackedRows(store, plan_rows(lengths, max(ROW_TOKENS, int(lengths.max()))), np.array(samples))
    with torch.no_grad():
        for batch in (to_device(collate([rows[row]]), device) for row in range(len(rows))):
            sums.add(objective(model, batch), supervised=len(batch["targets"]), tokens=len(batch["input_ids"]))
    loss, accuracy = (token_means(sums.total(list), "eval")[name] for name in ("eval/loss", "eval/token_accuracy"))
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "token_accuracy": accuracy}


def final_number(text: str) -> Decimal | None:
    """What an answer comes to: the number after the last '####', else after 'answer is', else the last of all.

    Commas and a currency's sign do not matter, nor do zeros at the end.
    """
    text = text.replace("$", "")
    for mark in ("####", "answer is"):
        _, found, rest = text.lower().rpartition(mark)
        if found and (number := NUMBER.search(rest)):
            return Decimal(number[0].replace(",", ""))
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def exact_matches(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers: among all of them, the mean of the families' shares, and each family's."""
    families: dict[str, list[bool]] = {}
    for example in examples:
        families.setdefault(example["family"], []).append(example["correct"])
    shares = {name: {"exact_match": fmean(right), "count": len(right)} for name, right in families.items()}
    of_families = fmean(share["exact_match"] for share in shares.values())
    of_samples = fmean(example["correct"] for example in examples)
    return {"exact_match": of_samples, "exact_match_by_family_mean": of_families, "by_family": shares}


def evaluate(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What becomes evaluation.json, with every answer as an example. Raises ValueError, DataError for unusable rows."""
    from dataset.demo import write_demo
    from dataset.prepare import DataOptions, prepare
    from model.build import known_positions
    from model.loading import load_model
    from training.device import choose_device

    device = choose_device(options.device)
    trust = Trust(code=options.trust_remote_code)
    model = load_model(directory, trust=trust).to(device).eval()
    tokenizer = chat_tokenizer(directory, options.chat_template, trust)
    path = write_demo(options.cache_dir / "demo")[1] if options.data_path == "demo" else Path(options.data_path)
    context = known_positions(model)
    wanted = DataOptions(
        options.prompt_field, options.response_field, options.system_field, max_seq_len=context,
        data_format=options.data_format, bad_rows=options.bad_rows, overlong=options.overlong,
        text_tokens=Config(text_tokens=options.text_tokens).data_options["text_tokens"], vanished=options.vanished,
        system_as=options.system_as, template_date=day_of_run(directory),
    )  # fmt: skip
    store = prepare(path, tokenizer, wanted, options.cache_dir, echo=lambda line: print(line, file=sys.stderr))
    cases = read_cases(path, store, options.limit)
    for case in cases if options.numbers else ():
        if final_number(tokenizer.decode(case.expected)) is None:
            raise ValueError(f"{store.where(case.sample)} has no number in its answer: leave out --numbers")
    means = held_out_means(model, store, [case.sample for case in cases], device)
    ends = {tokenizer.eos_token_id, *(case.end for case in cases)}
    started = time.perf_counter()
    answers = answer_all(model, [case.prompt for case in cases], options.max_new_tokens, options.batch_size, ends)
    speed = sum(len(ids) for ids, _ in answers) / (time.perf_counter() - started)
    examples = []
    for case, (ids, cut) in zip(cases, answers, strict=True):
        texts = tokenizer.batch_decode([case.prompt, case.expected, ids], clean_up_tokenization_spaces=False)
        example = dict(zip(("prompt", "expected", "answer"), texts, strict=True), family=case.family)
        example["correct"] = not cut and example["answer"] == example["expected"]
        if options.numbers:
            example["number_correct"] = not cut and final_number(example["answer"]) == final_number(example["expected"])
        examples.append(example)
    numbers = {"number_match": fmean(example["number_correct"] for example in examples)} if options.numbers else {}
    counts = {"samples": len(cases), "cut_answers": sum(cut for _, cut in answers)}
    sources = {"data_path": str(path), "model": str(directory), "generated_tokens_per_second": speed}
    return {**exact_matches(examples), **numbers, **means, **counts, **sources, "examples": examples}


def print_result(result: dict[str, Any], shown: int) -> None:
    for example in spread(result["examples"], shown):
        print(f"{example['prompt']}\nexpected  {example['expected']}")
        print(f"answer {'✓' if example['correct'] else '✗'}  {example['answer']}\n")
    rows = [(name, share["count"], share["exact_match"]) for name, share in result["by_family"].items()]
    rows.append(("mean of families", len(rows), result["exact_match_by_family_mean"]))
    rows.append(("mean of samples", result["samples"], result["exact_match"]))
    width = max(len(name) for name, _, _ in rows)
    print(f"{'':{width}}  count  exact match")
    for name, count, share in rows:
        print(f"{name:{width}}  {count:5}  {share:11.1%}")
    names = ("number_match", "loss", "perplexity", "token_accuracy", "generated_tokens_per_second", "cut_answers")
    print(", ".join(f"{name.replace('_', ' ')} {result[name]:.4g}" for name in names if name in result))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    from model.build import exported_directory

    try:
        directory = exported_directory(options.directory.absolute())
        out = options.out or (directory.parent if directory.name == "final" else directory) / "evaluation.json"
        out.parent.mkdir(parents=True, exist_ok=True)  # a wrong path is to be heard of before the work, not after
        if out.is_dir():
            raise ValueError(f"--out {out} is a directory, name a file in it")
        result = evaluate(options, directory)
        replace_json(out, strict({**result, "examples": spread(result["examples"], 10)}))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    print_result(result, options.show)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
