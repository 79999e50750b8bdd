"""The model card: what a stranger who finds the exported directory needs to know."""

import json
from typing import Any


def model_card(config: dict[str, Any], report: dict[str, Any], results: dict[str, float], step: int) -> str:
    """README.md of an exported model, from the resolved flags, the token ledger and the last validation."""
    train = report["train"]
    base = "trained from scratch" if config["from_weight"] == "none" else f"fine-tuned from `{config['from_weight']}`"
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
        *((name.replace("/", " ").replace("_", " "), f"{value:.4f}") for name, value in results.items()),
    ]
    sources = ", ".join(f"`{source['path']}`" for source in train["sources"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A chat model, {base}

Supervised fine-tuning on the assistant turns of {sources}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def _adapters(config: dict[str, Any]) -> str:
    alpha, targets = config["lora_alpha"] or 2 * config["lora_rank"], config["lora_targets"] or "all linear layers"
    return f"rank {config['lora_rank']}, alpha {alpha}, {targets}, merged; the adapters alone are in `adapter/`"
