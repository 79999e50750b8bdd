"""Trains tiny models of many families and writes down what was measured: `python -m scripts.bench.models`.

Each family is a random model made from its configuration, saved by transformers and trained through --from_weight. A
cell holds the largest difference that was found; one that is over its limit is bold, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.verify.checks import difference, write_rows
from scripts.verify.ranks import resume_from, run_ranks, train_rank
from scripts.verify.workers import largest, logits_and_gradient, random_document
from training.checkpoints.checkpointer import open_shards
from training.checkpoints.store import CheckpointStore
from training.records.metrics import read_records

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
OUT = Path("docs/models.md")
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 8}  # shorter than the documents
FLAGS = {
    "max_seq_len": 64, "batch_size": 1, "global_batch_size": 2, "epochs": 2, "optimizer": "sgd", "learning_rate": 0.02,
    "dtype": "float32", "device": "cpu", "log_interval": 1, "save_interval": 2, "keep_last": 9, "report": 0, "seed": 7,
    "skip_checks": 1,
}  # fmt: skip
LORA_RANK = 4
DOCUMENTS = [random_document(number, length) for number, length in enumerate((24, 3, 40, 13))]
PROMPTS = [random_document(number, length).ids.tolist() for number, length in ((7, 5), (8, 19), (9, 1))]


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers, what of it differs from SHAPE, and what the table says beside it."""

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    lora_targets: str = "q_proj,v_proj"


FAMILIES = {
    "Llama": Family("Llama"),
    "Qwen2": Family("Qwen2"),
    "Qwen3": Family("Qwen3"),
    "Qwen3-MoE": Family("Qwen3Moe", EXPERTS, "experts"),
    "Mistral": Family("Mistral", WINDOW, "window"),
    "Mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "experts"),
    "Gemma": Family("Gemma"),
    "Gemma 2": Family("Gemma2", WINDOW, "window in every other layer, soft-capping"),
    "Gemma 3": Family("Gemma3Text", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}, "window"),
    "Phi-3": Family("Phi3", lora_targets="qkv_proj"),
    "SmolLM3": Family("SmolLM3"),
    "OLMo-2": Family("Olmo2"),
    "OLMoE": Family("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "experts"),
    "GPT-NeoX": Family("GPTNeoX", lora_targets="query_key_value"),
    "GPT-2": Family(
        "GPT2", {"n_positions": 128, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, lora_targets="c_attn"
    ),
    "StarCoder2": Family("Starcoder2", {**WINDOW, "residual_dropout": 0, "embedding_dropout": 0}, "window"),
    "Granite": Family("Granite"),
    "Cohere": Family("Cohere"),
    "GLM-4": Family("Glm4"),
    "GPT-OSS": Family(
        "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}, "experts, window, attention sinks"
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4,
        },
        "experts, latent attention", "q_a_proj,q_b_proj",
    ),
    "Falcon": Family("Falcon", {"head_dim": None}, lora_targets="query_key_value"),
    "BLOOM": Family("Bloom", {"n_head": 4, "n_layer": 2}, "ALiBi", "query_key_value"),
    "MPT": Family("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi", "Wqkv"),
    "StableLM": Family("StableLm"),
    "Nemotron": Family("Nemotron"),
    "Llama 4": Family(
        "Llama4Text", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "experts, attention in chunks",
    ),
    "Mamba": Family("Mamba", {"state_size": 4}, "state-space", "in_proj,x_proj"),
    "Mamba 2": Family(
        "Mamba2", {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}, "state-space", "in_proj"
    ),
    "Bamba": Family(
        "Bamba", {
            "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "attn_layer_indices": [1],
        }, "state-space and attention",
    ),
    "LFM2": Family("Lfm2", {"layer_types": ["conv", "full_attention"]}, "convolutions and attention"),
    "Qwen3-Next": Family(
        "Qwen3Next", {
            **EXPERTS, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        }, "experts, linear attention",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A family


@dataclass
class Cell:
    """A measured difference and the largest that is right, or words; `error` where nothing could be measured."""

    value: float | str
    limit: float = 0.0
    error: str = ""

    @property
    def fails(self) -> bool:
        return bool(self.error) or (not isinstance(self.value, str) and not self.value <= self.limit)  # also for NaN

    def __str__(self) -> str:
        text = self.value if isinstance(self.value, str) else f"{self.value:.0e}" if self.value else "0"
        return f"**{text or self.error}**" if self.fails else text


class Trial:
    """One family in a directory of its own: its model, and the runs that several columns look at."""

    def __init__(self, family: Family, work: Path, rows: Path):
        self.family, self.work, self.rows, self.model = family, work, rows, work / "model"
        self.runs: dict[str, Path] = {}

    def save_model(self) -> None:
        """A random model, saved as transformers saves it, with our tokenizer beside it."""
        import torch
        import transformers

        from model.build import OWN_TOKENIZER, load_tokenizer

        shape = {"vocab_size": len(load_tokenizer(str(OWN_TOKENIZER))), **SHAPE, **self.family.changes}
        config = {name: value for name, value in shape.items() if value is not None}
        torch.manual_seed(0)
        made = getattr(transformers, f"{self.family.config}Config")(**config)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(self.model)
        for file in OWN_TOKENIZER.iterdir():
            shutil.copy(file, self.model)

    def train(self, name: str, world_size: int = 1, **flags: Any) -> Path:
        """A run that must end well; the second time it is there already."""
        run = self.work / name
        if name not in self.runs:
            files = {"data_path": self.rows, "val_data_path": self.rows, "cache_dir": self.rows.parent / "cache"}
            values = {**FLAGS, **files, "from_weight": self.model, "save_dir": run, **flags}
            values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
            if any(run_ranks(train_rank, world_size, (values, str(run), None))):
                lines = [line for line in Path(f"{run}.rank0.log").read_text().splitlines() if line.strip()]
                raise RuntimeError(next((line for line in lines if line.startswith("error")), lines[-1]))
            self.runs[name] = run
        return run

    def losses(self, run: Path) -> list[float]:
        return [record["train/loss"] for record in read_records(run / "metrics.jsonl") if "train/loss" in record]

    # --- columns

    def reading(self) -> Cell:
        """How it reads a row."""
        from model.loading import load_model

        return Cell("side by side" if getattr(load_model(self.model), "reading", "") == "apart" else "packed")

    def isolated(self) -> Cell:
        """Logits and gradient of packed documents against those of each alone, in float64."""
        model = self._double()
        packed, gradient = logits_and_gradient(model, [DOCUMENTS])
        alone, sum_of_gradients = logits_and_gradient(model, [[document] for document in DOCUMENTS])
        return Cell(max(largest(packed - alone), largest(gradient - sum_of_gradients) / largest(gradient)), 1e-5)

    def influence(self) -> Cell:
        """The largest gradient of a document's logits by the embeddings of another."""
        import torch

        from dataset.rows import collate

        embedded: list[Any] = []
        logits: list[Any] = []

        def collect(chunk: Any, positions: slice) -> dict[str, Any]:
            logits.append(chunk)
            return {}

        model = self._double()
        with model.input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2])):
            model(collate([DOCUMENTS]), collect)
        lengths, found = [len(document.ids) - 1 for document in DOCUMENTS], 0.0
        for number, own in enumerate(torch.cat(logits).split(lengths)):
            (gradient,) = torch.autograd.grad(own.square().sum(), embedded, retain_graph=True)
            parts = gradient.flatten(0, -2).split(lengths)
            if not parts[number].any():
                raise RuntimeError("a document has no influence on itself")
            found = max(found, largest(torch.cat([part for n, part in enumerate(parts) if n != number])))
        return Cell(found)

    def as_transformers(self) -> Cell:
        """Logits of packed documents against those by transformers of each alone, in float64, attention and all."""
        import torch
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        ).train()
        packed, _ = logits_and_gradient(self._double(), [DOCUMENTS])
        return Cell(largest(packed - self._alone(theirs)), 1e-5)

    def resumed(self) -> Cell:
        """A run of two processes that goes on from its first checkpoint against itself."""
        whole = self.train("two", 2)
        steps = CheckpointStore(whole / "checkpoints").steps()
        cut = resume_from(whole, steps[0], self.work / "cut")
        return Cell(difference(whole, self.train("cut", 2, from_resume=1, save_dir=cut)))

    def ddp(self) -> Cell:
        return self._against_one(self.train("two", 2))

    def fsdp(self) -> Cell:
        return self._against_one(self.train("shared", 2, strategy="fsdp"))

    def lora(self) -> Cell:
        """Merged weights are the base plus a matrix of low rank, or the base; the loss is that of base and adapters."""
        from safetensors.torch import load_file

        run = self.train("lora", lora_rank=LORA_RANK, lora_targets=self.family.lora_targets, learning_rate=0.2)
        base, merged = (load_file(path / "model.safetensors") for path in (self.model, run / "final"))
        changed = [name for name in base if not base[name].equal(merged[name])]
        wanted = self.family.lora_targets.split(",")
        if not changed or not all(any(f".{target}." in name for target in wanted) for name in changed):
            return Cell("", error=f"the base has changed: {changed[:2]}")
        for name in changed:
            sizes = (merged[name].double() - base[name].double()).flatten(1).svd().S
            if sizes[LORA_RANK] > 1e-3 * sizes[0]:
                return Cell("", error=f"{name} has changed by more than rank {LORA_RANK}")
        measured = [record for record in read_records(run / "metrics.jsonl") if "eval/loss" in record][-1]["eval/loss"]
        return Cell(abs(measured - self._held_out_loss(run / "final")), 1e-4)

    def exported(self) -> Cell:
        """Logits of the last checkpoint against those of final/ by transformers, in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        from model.loading import load_model

        run = self.train("two", 2)
        theirs, info = AutoModelForCausalLM.from_pretrained(
            run / "final", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
        )
        if any(info.values()):
            return Cell("", error=f"not all of it is found: {info}")
        trained = load_model(self.model)
        store = CheckpointStore(run / "checkpoints")
        weights = open_shards(store.path(store.steps()[-1]), "model").tensors()
        with torch.no_grad():
            for name, tensor in trained.state_dict(keep_vars=True).items():
                if name in weights:  # a tied head stands once
                    tensor.copy_(weights[name])
        packed, _ = logits_and_gradient(trained, [DOCUMENTS])
        return Cell(largest(packed - self._alone(theirs)) / largest(packed), 1e-4)

    def answers(self) -> Cell:
        """Greedy answers to prompts of different lengths, all at once against one by one."""
        from model.generate import generate
        from model.loading import load_model

        model, wanted = load_model(self.model), {"max_new_tokens": 12, "eos_token_ids": [2]}
        alone = [generate(model, [prompt], **wanted)[0] for prompt in PROMPTS]
        equal = sum(a == b for a, b in zip(generate(model, PROMPTS, **wanted), alone, strict=True))
        return Cell(f"{equal}/{len(PROMPTS)}", error="" if equal == len(PROMPTS) else "other answers in a batch")

    # --- what they are made of

    def _double(self) -> Any:
        from model.loading import load_model
        from model.transformers_model import HFCausalLM

        model = load_model(self.model)
        if isinstance(model, HFCausalLM):
            model.config._experts_implementation = "eager"  # the other ones take no float64
        return model.double().train()

    def _alone(self, theirs: Any) -> Any:
        import torch

        with torch.no_grad():
            ids = [torch.from_numpy(document.ids[:-1])[None] for document in DOCUMENTS]
            return torch.cat([theirs(input_ids=each, use_cache=False).logits[0] for each in ids])

    def _against_one(self, run: Path) -> Cell:
        """Weights and losses against those of one process that accumulates."""
        from safetensors.torch import load_file

        one = self.train("one")
        weights = [load_file(each / "final" / "model.safetensors") for each in (one, run)]
        gaps = [largest(weights[0][name] - weights[1][name]) for name in weights[0]]
        gaps += [abs(a - b) for a, b in zip(*map(self.losses, (one, run)), strict=True)]
        return Cell(max(gaps), 1e-4)

    def _held_out_loss(self, directory: Path) -> float:
        import torch

        from dataset.prepare import DataOptions, prepare
        from model.build import load_tokenizer
        from model.loading import load_model
        from scripts.evaluate import held_out_means

        options, tokenizer = DataOptions(max_seq_len=FLAGS["max_seq_len"]), load_tokenizer(str(directory))
        store = prepare(self.rows, tokenizer, options, self.rows.parent / "cache", echo=lambda line: None)
        model = load_model(directory).eval()
        return held_out_means(model, store, list(range(store.num_samples)), torch.device("cpu"))["loss"]


COLUMNS: dict[str, tuple[str, Callable[[Trial], Cell]]] = {
    "rows": ("how the documents of a row are computed", Trial.reading),
    "isolated": ("packed against alone, logits and gradient, float64", Trial.isolated),
    "influence": ("the largest gradient of a document's logits by another document", Trial.influence),
    "as transformers": ("packed against each document alone by transformers, float64", Trial.as_transformers),
    "resume": ("a resumed run of two processes against itself, weights, optimizer and log", Trial.resumed),
    "DDP": ("two processes against one, weights and losses, float32", Trial.ddp),
    "FSDP2": ("the same with shared weights", Trial.fsdp),
    "LoRA": ("held-out loss after merging against before; the base is unchanged", Trial.lora),
    "export": ("`final/` by transformers against the checkpoint, logits, float32, relative", Trial.exported),
    "answers": ("greedy answers in a batch that equal those one by one", Trial.answers),
}  # fmt: skip


def measure(name: str, work: Path, rows: Path, columns: Iterable[str] = ()) -> dict[str, Cell]:
    """All columns of a family, or some; what breaks is a cell that fails."""
    trial, cells = Trial(FAMILIES[name], work, rows), {}
    work.mkdir(parents=True)
    trial.save_model()
    for column in columns or COLUMNS:
        try:
            cells[column] = COLUMNS[column][1](trial)
        except Exception as error:  # whatever a family does not like is what the table is for
            cells[column] = Cell("", error=f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# The table


def as_table(found: dict[str, dict[str, Cell]]) -> str:
    from importlib.metadata import version

    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in found.items():
        note = f" ({FAMILIES[name].note})" if FAMILIES[name].note else ""
        lines.append(f"| {name}{note} | {' | '.join(str(cell) for cell in cells.values())} |")
    lines += ["", *(f"- *{column}*: {what}" for column, (what, _) in COLUMNS.items())]
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate"))
    return "\n".join([*lines, "", f"Measured on a CPU with {versions}."])


def with_table(text: str, table: str) -> str:
    """The text with this table in the place of its own. Raises ValueError where it has none."""
    if BEGIN not in text or END not in text.split(BEGIN)[1]:
        raise ValueError(f"no table to renew: it stands between the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.models", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--families", metavar="A,B", help="only these (default: all, and the table is written)")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"file whose table to renew (default {OUT} for all)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers here too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    names = options.families.split(",") if options.families else list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        print(f"error: --families {','.join(unknown)}: the families are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    out = options.out or (None if options.families else OUT)
    try:
        page = out.read_text(encoding="utf-8") if out else f"{BEGIN}{END}"
        with_table(page, "")
    except (OSError, ValueError) as error:  # not after half an hour
        print(f"error: --out {out}: {error}", file=sys.stderr)
        return 2
    found: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory(prefix="models-") as work:
        rows = write_rows(Path(work) / "rows.jsonl", 12)
        for name in names:
            began = time.monotonic()
            found[name] = measure(name, Path(work) / name.replace(" ", "-"), rows)
            told = ", ".join(f"{column} {cell}" for column, cell in found[name].items())
            print(f"{name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    if out:
        out.write_text(with_table(page, as_table(found)), encoding="utf-8")
    if options.json:
        numbers = {name: {column: vars(cell) for column, cell in cells.items()} for name, cells in found.items()}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return int(any(cell.fails for cells in found.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
