"""How fast the trainer is on this machine, beside TRL's SFTTrainer: same shape, same data, alternating runs, medians.

    python -m scripts.bench --data_path train.jsonl --prompt_field question --response_field answer

Each round runs the trainer, with --moe once more as a mixture of experts with as many weights per token, then TRL, each
in a process of its own, and measures the rate of a plain matrix product between them. Tokens are real ones, never
padding; FLOPs are 6 x body weights x tokens + 6 x head weights x supervised tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.measure import SMALL, data_flags, in_turns, median, parser_of, run_child, train
from scripts.evaluate import positive


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("bench", __doc__, rounds=3, steps=4, batch_size=4, max_seq_len=1024, threads=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--trl_batch_size", type=positive, default=16, help="samples of TRL's batch (dynamic padding)")
    parser.add_argument("--without_trl", action="store_true", help="measure the trainer alone")
    parser.add_argument("--moe", action="store_true", help="measure the trainer with --use_moe 1 too")
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the options of TRL, in a process of its own
    return parser.parse_args(argv)


def run_ours(options: argparse.Namespace, directory: Path, **more: Any) -> dict[str, Any]:
    """The trainer itself with `more` flags; the first step warms caches up, the last one carries the save before it."""
    flags = {
        **SMALL, **data_flags(options), "dtype": options.dtype, "max_steps": options.steps,
        "batch_size": options.batch_size, "save_interval": options.steps - 1, "save_dir": directory, **more,
    }  # fmt: skip
    report = directory / "data_report.json"
    found = train(options.threads, slice(1, -1), **flags)
    return {**found, "packing_efficiency": json.loads(report.read_text())["train"]["efficiency"]}


def run_trl(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    out = directory / "trl.json"
    told = json.dumps({**vars(options), "data_path": str(data_flags(options)["data_path"]), "out": str(out)})
    peak = run_child(["-m", "scripts.bench", "--child", told], options.threads)
    return {**json.loads(out.read_text()), "peak_bytes": peak}


def contend_trl(options: argparse.Namespace) -> None:
    """SFTTrainer on the same conversations, in its ordinary form: completion-only loss, dynamic padding, no packing."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from dataset.demo import write_demo
    from dataset.prepare import DataOptions
    from dataset.reader import Conversation, read_conversations
    from model.build import choose_tokenizer, load_tokenizer

    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(choose_tokenizer(None, "none"))
    path = write_demo(Path(options.out).parent / "demo")[0] if options.data_path == "demo" else Path(options.data_path)
    fields = DataOptions(prompt_field=options.prompt_field, response_field=options.response_field).fields()
    chats = [row.messages for row in read_conversations(path, fields) if isinstance(row, Conversation)]
    rows = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SMALL))
    settings = SFTConfig(
        output_dir=str(Path(options.out).parent / "trl"), per_device_train_batch_size=options.trl_batch_size,
        max_steps=options.steps, max_length=options.max_seq_len, bf16=options.dtype == "bfloat16", use_cpu=True,
        gradient_checkpointing=False, learning_rate=5e-4, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]
    )
    collate = trainer.data_collator

    def counting(samples: list[dict[str, Any]]) -> Any:
        batch = collate(samples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    rates = [count / seconds for count, seconds in zip(tokens, times, strict=False)]
    Path(options.out).write_text(json.dumps({"tokens_per_second": rates[1:], "seconds_per_step": times[1:]}))


def matmul_rate(options: argparse.Namespace) -> float:
    """FLOP/s of the model's largest matrix product in the benchmark's arithmetic, median of ten."""
    import torch

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = options.batch_size * options.max_seq_len
    x = torch.randn(rows, SMALL["hidden_size"]).to(dtype)
    w = torch.randn(SMALL["intermediate_size"], SMALL["hidden_size"]).to(dtype)
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * SMALL["hidden_size"] * SMALL["intermediate_size"] / statistics.median(seconds[1:])


def summarise(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians over all counted steps of all rounds."""
    from model.decoder import Decoder, DecoderConfig

    ours, moe, trl = (found.get(name, []) for name in ("trainer", "with experts", "TRL"))
    body, head = Decoder(DecoderConfig(vocab_size=6400, **SMALL)).parameter_counts()
    speed, rate = median(ours, "tokens_per_second"), statistics.median(found["before"] + found["after"])
    flops = 6 * body * speed + 6 * head * median(ours, "supervised_tokens_per_second")
    result = {
        "parameters": body + head,
        "tokens_per_second": speed,
        "model_flops_per_second": flops,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": flops / rate,
        **{
            name: median(ours, name)
            for name in ("data_wait_share", "seconds_per_step", "cpu_seconds_per_step", "checkpoint_seconds")
        },
        "packing_efficiency": ours[0]["packing_efficiency"],
        "peak_bytes": max(run["peak_bytes"] for run in ours),
    }
    if moe:
        result["moe_tokens_per_second"] = median(moe, "tokens_per_second")
        result["moe_seconds_to_dense"] = speed / result["moe_tokens_per_second"]
    if trl:
        result["trl_tokens_per_second"] = median(trl, "tokens_per_second")
        result["ratio_to_trl"] = speed / result["trl_tokens_per_second"]
        result["trl_peak_bytes"] = max(run["peak_bytes"] for run in trl)
    return result


def main() -> None:
    options = parse()
    if options.child:
        contend_trl(argparse.Namespace(**json.loads(options.child)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory, product = Path(scratch), partial(matmul_rate, options)
        variants = {"before": product, "trainer": partial(run_ours, options, directory / "run")}
        if options.moe:
            variants["with experts"] = partial(run_ours, options, directory / "moe", use_moe=1)
        variants["after"] = product
        if not options.without_trl:
            variants["TRL"] = partial(run_trl, options, directory)
        result = summarise(in_turns(options.rounds, variants))
    Path(options.out).write_text(json.dumps({**result, "options": vars(options)}, indent=1), encoding="utf-8")
    for name, value in result.items():
        print(f"{name:28} {value:,.4g}" if value < 100 else f"{name:28} {value:,.0f}")


if __name__ == "__main__":
    main()
