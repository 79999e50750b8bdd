"""The model card: what a stranger who finds the exported directory needs to know."""

import json
from pathlib import Path
from typing import Any

import yaml

TAGS = ["conversational", "sft"]
OF_A_START = ("save_dir", "cache_dir", "from_resume", "overwrite", "allow_change")  # a resumed run has the same card
COUNTS = ("rows_read", "rows_kept", "rows_rejected", "samples", "tokens", "supervised_tokens")
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

`transformers serve .` or `vllm serve .` in this directory answers clients of the OpenAI API; as a GGUF file it runs in
llama.cpp and Ollama."""


def model_card(config: dict[str, Any], report: dict[str, Any], results: dict[str, float], step: int) -> str:
    """README.md of an exported model, from the resolved flags, the token ledger and the last validation."""
    train, base = report["train"], config["from_weight"]
    from_hub = base != "none" and not Path(base).is_absolute() and not Path(base).is_dir()
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, "lora" if config.get("lora_rank") else "full-sft"],
    }
    head |= {"base_model": base} if from_hub else {}
    origin = "trained from scratch" if base == "none" else f"fine-tuned from `{base}`"
    stages = [{**config, **row} for row in json.loads(config["stages"])] if config["stages"] else [config]

    def said(name: str) -> str:
        """The value of a flag, or those of all stages in their order."""
        return ", ".join(dict.fromkeys(str(stage[name]) for stage in stages))

    rows = [
        ("samples", train["samples"]),
        ("tokens", train["tokens"]),
        ("supervised share", f"{train['supervised_share']:.1%}"),
        ("steps", step),
        *((("stages", ", ".join(stage["name"] for stage in stages)),) if config["stages"] else ()),
        ("rows per step", said("global_batch_size")),
        ("tokens of a row", said("max_seq_len")),
        ("peak learning rate", said("learning_rate")),
        *((("teacher", config["teacher"]), ("loss weights", said("loss_weights"))) if config["teacher"] else ()),
        ("arithmetic", config["dtype"]),
        ("seed", config["seed"]),
        *((("LoRA", _adapters(config)),) if config.get("lora_rank") else ()),
    ]
    scores = [(name.replace("/", " ").replace("_", " "), f"{value:.4f}") for name, value in results.items()]
    ledger = [
        (part.replace("_", " "), f"`{source['path']}`", *(source[name] for name in COUNTS))
        for part in ("train", "held_out")
        for source in (report[part] or {"sources": []})["sources"]
    ]
    chosen = {name: value for name, value in config.items() if value is not None and name not in OF_A_START}
    settings = yaml.safe_dump(chosen, sort_keys=False)
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# A chat model, {origin}",
        f"Supervised fine-tuning on the assistant turns of {', '.join(row[1] for row in ledger if row[0] == 'train')}.",
        _table(("", ""), rows),
        *(("## Scores", "On the held-out data, after the last step:", _table(("", ""), scores)) if scores else ()),
        "## Use",
        USE,
        "## Data",
        _table(("part", "source", *(name.replace("_", " ") for name in COUNTS)), ledger),
        "## Settings",
        f"<details><summary>the flags of the training</summary>\n\n```yaml\n{settings}```\n\n</details>",
    ]
    return "\n\n".join(sections) + "\n"


def _adapters(config: dict[str, Any]) -> str:
    rank, targets = config["lora_rank"], config["lora_targets"] or "all linear layers but the head"
    alpha = config["lora_alpha"] or 2 * rank
    return f"rank {rank}, alpha {alpha}, {targets}, merged; the adapters alone are in `adapter/`"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Markdown; what a cell holds cannot end it."""
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(line) + " |" if any(line) else "|" + " |" * len(line) for line in (list(head), *cells)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
