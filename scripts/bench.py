"""How fast the trainer is on this machine, beside TRL's SFTTrainer: same shape, same data, alternating runs, medians.

    python -m scripts.bench --data_path train.jsonl --prompt_field question --response_field answer

Each round runs the trainer, with --moe once more as a mixture of experts with as many weights per token, then TRL, each
in a process of its own, and measures the rate of a plain matrix product between them. Tokens are real ones, never
padding; FLOPs are 6 x body weights x tokens + 6 x head weights x supervised tokens.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1664,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="demo", help="training data, as for the trainer")
    parser.add_argument("--prompt_field")
    parser.add_argument("--response_field")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2, help="threads of each contender")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the two contenders")
    parser.add_argument("--steps", type=int, default=4, help="steps per round; the first one is not counted")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of the trainer's micro-batch")
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--trl_batch_size", type=int, default=16, help="samples of TRL's batch (dynamic padding)")
    parser.add_argument("--without_trl", action="store_true", help="measure the trainer alone")
    parser.add_argument("--moe", action="store_true", help="measure the trainer with --use_moe 1 too")
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--contender", choices=("trl",), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measured(command: list[str], threads: int) -> tuple[int, float]:
    """Peak resident bytes and seconds of a child process; raises RuntimeError with its output when it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
        return usage.ru_maxrss * 1024, time.perf_counter() - started


def run_ours(options: argparse.Namespace, directory: Path, **more: Any) -> dict[str, Any]:
    """The trainer itself with `more` flags, read back from its metrics."""
    flags = {
        **SHAPE,
        "data_path": options.data_path,
        "dtype": options.dtype,
        "device": "cpu",
        "max_steps": options.steps,
    }
    flags |= {
        "batch_size": options.batch_size,
        "max_seq_len": options.max_seq_len,
        "save_dir": directory,
        "report": 0,
        "overwrite": 1,
    }
    flags |= {"log_interval": 1, "save_interval": options.steps - 1, "eval_interval": "99epoch"}
    if options.prompt_field:
        flags |= {"prompt_field": options.prompt_field, "response_field": options.response_field}
    words = [word for name, value in (flags | more).items() for word in (f"--{name}", str(value))]
    peak, _ = measured([sys.executable, "train_full_sft.py", *words], options.threads)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    # the first step warms caches up, the last one carries the save before it
    steps = [r for r in records if r["kind"] == "train"][1:-1]
    report = json.loads((directory / "data_report.json").read_text())["train"]
    return {
        "tokens_per_second": [r["train/tokens_per_second"] for r in steps],
        "supervised_per_second": [r["train/supervised_tokens_per_second"] for r in steps],
        "data_wait_share": [r["train/data_wait_share"] for r in steps],
        "seconds_per_step": [r["train/seconds_per_step"] for r in steps],
        "checkpoint_seconds": [r["seconds"] for r in records if r.get("event") == "checkpoint"],
        "packing_efficiency": report["efficiency"],
        "peak_bytes": peak,
    }


def run_trl(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    out = directory / "trl.json"
    ours_alone = ("contender", "out", "without_trl", "moe")
    own = [f"--{k}={v}" for k, v in vars(options).items() if k not in ours_alone and v is not None]
    peak, _ = measured(
        [sys.executable, "-m", "scripts.bench", *own, "--contender", "trl", "--out", str(out)], options.threads
    )
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
    from model.choose import choose_tokenizer, load_tokenizer

    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(choose_tokenizer(None, "none"))
    path = write_demo(Path(options.out).parent / "demo")[0] if options.data_path == "demo" else Path(options.data_path)
    fields = DataOptions(prompt_field=options.prompt_field, response_field=options.response_field).fields()
    chats = [row.messages for row in read_conversations(path, fields) if isinstance(row, Conversation)]
    rows = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE))
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
    x = torch.randn(rows, SHAPE["hidden_size"]).to(dtype)
    w = torch.randn(SHAPE["intermediate_size"], SHAPE["hidden_size"]).to(dtype)
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * SHAPE["hidden_size"] * SHAPE["intermediate_size"] / statistics.median(seconds[1:])


def summarise(
    ours: list[dict[str, Any]], moe: list[dict[str, Any]], trl: list[dict[str, Any]], rates: list[float]
) -> dict[str, Any]:
    """Medians over all counted steps of all rounds."""
    from model.decoder import Decoder, DecoderConfig

    body, head = Decoder(DecoderConfig(vocab_size=6400, **SHAPE)).parameter_counts()

    def median(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(value for run in runs for value in run[name])

    speed = median(ours, "tokens_per_second")
    flops = 6 * body * speed + 6 * head * median(ours, "supervised_per_second")
    result = {
        "parameters": body + head,
        "tokens_per_second": speed,
        "model_flops_per_second": flops,
        "matmul_flops_per_second": statistics.median(rates),
        "share_of_matmul_rate": flops / statistics.median(rates),
        "data_wait_share": median(ours, "data_wait_share"),
        "seconds_per_step": median(ours, "seconds_per_step"),
        "checkpoint_seconds": median(ours, "checkpoint_seconds"),
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
    if options.contender:
        contend_trl(options)
        return
    if options.data_path != "demo":
        options.data_path = str(Path(options.data_path).resolve())
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    ours, moe, trl, rates = [], [], [], []
    try:
        for number in range(1, options.rounds + 1):
            rates.append(matmul_rate(options))
            ours.append(run_ours(options, directory / "run"))
            if options.moe:
                moe.append(run_ours(options, directory / "moe", use_moe=1))
            rates.append(matmul_rate(options))
            if not options.without_trl:
                trl.append(run_trl(options, directory))
            said = f"trainer {statistics.median(ours[-1]['tokens_per_second']):,.0f} tokens/s"
            said += f", with experts {statistics.median(moe[-1]['tokens_per_second']):,.0f}" if moe else ""
            said += f", TRL {statistics.median(trl[-1]['tokens_per_second']):,.0f}" if trl else ""
            print(f"round {number} of {options.rounds}: {said}", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    result = {**summarise(ours, moe, trl, rates), "options": vars(options)}
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, value in result.items():
        if name != "options":
            print(f"{name:28} {value:,.4g}" if value < 100 else f"{name:28} {value:,.0f}")


if __name__ == "__main__":
    main()
