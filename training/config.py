"""What a user can set: one typed dataclass that is the command line, the YAML file and the saved config.yaml at once.

Defaults < YAML file < command line. Everything that is wrong is collected and reported in one message, because a user who
mends one flag per attempt is a user who leaves. This module imports neither torch nor transformers: `--help` must be instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEMO_CONFIG = "configs/demo.yaml"
ALLOWED_CHANGES = ("data", "template", "model", "seed", "schedule", "optimizer", "precision", "global_batch_size")


SHAPE_FLAGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")

DATA_FLAGS = (
    "prompt_field", "response_field", "system_field", "max_seq_len", "overlong", "bad_rows", "data_format", "train_on",
)  # fmt: skip
REQUEST_FLAGS = (
    "data_path", "val_data_path", "val_fraction", "seed", "packing", "repack", "files_per_epoch", "file_fraction",
    "system_prompts", "system_prompt_ratio", "cache_dir", "tokenize_workers",
)  # fmt: skip
ALTERNATIVES = (
    ("warmup_steps", "warmup_ratio"),
    ("val_data_path", "val_fraction"),
    ("epochs", "max_steps"),
    ("accumulation_steps", "global_batch_size"),
)
LOADING_FLAGS = ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")


class ConfigError(ValueError):
    """Every problem of a configuration, one per line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def flag(
    default: Any, help: str, *, group: str, choices: tuple[str, ...] = (), minimum: float | None = None,
    maximum: float | None = None, above: float | None = None, interval: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that is also a command line flag; `above` is an exclusive lower bound."""
    bounds = {"minimum": minimum, "maximum": maximum, "above": above}
    return field(
        default=default, metadata={"help": help, "group": group, "choices": choices, "interval": interval, **bounds}
    )


@dataclass
class Config:
    """Every argument of a run; names are those of the flags."""

    # fmt: off
    data_path: str = flag("demo", "training data: files, patterns, directories or Hub data sets with weights (a.jsonl:2,b.parquet:0.5), or 'demo'", group="data")
    val_data_path: str | None = flag(None, "held-out data, the same without weights", group="data")
    val_fraction: float = flag(0.0, "share of --data_path held out for validation", group="data", minimum=0, maximum=0.5)
    data_format: str = flag("auto", "layout of the rows", group="data", choices=("auto", "messages", "sharegpt", "conversations", "alpaca", "prompt", "text", "fields"))
    train_on: str = flag("assistant", "what is trained: assistant turns, the last one, those that say so, all tokens", group="data", choices=("assistant", "last", "marked", "all"))
    system_prompts: str | None = flag(None, "file of system prompts, one per line, for conversations without one", group="data")
    system_prompt_ratio: float = flag(0.2, "share of those conversations that get one", group="data", above=0, maximum=1)
    prompt_field: str | None = flag(None, "name of the prompt field in rows without messages", group="data")
    response_field: str | None = flag(None, "name of the answer field in rows without messages", group="data")
    system_field: str | None = flag(None, "name of the system prompt field in rows without messages", group="data")
    max_seq_len: int = flag(1024, "tokens of a row; several samples are packed into one", group="data", minimum=2)
    packing: bool = flag(True, "lay samples end to end in rows; 0 = one sample per row (no row is ever padded)", group="data")
    repack: bool = flag(False, "lay the samples into rows afresh in each epoch", group="data")
    files_per_epoch: int | None = flag(None, "files that an epoch draws from those of --data_path (default: all)", group="data", minimum=1)
    file_fraction: float = flag(1.0, "share of each file's samples that an epoch draws", group="data", above=0, maximum=1)
    overlong: str = flag("error", "what to do with a sample longer than a row", group="data", choices=("error", "drop", "truncate"))
    bad_rows: str = flag("error", "what to do with a row that cannot be trained", group="data", choices=("error", "skip"))
    cache_dir: str = flag(".cache/tokens", "directory of the tokenised data", group="data")
    tokenize_workers: int | None = flag(None, "processes that tokenise (default: one per core)", group="data", minimum=1)
    num_workers: int = flag(0, "processes that load batches, per rank (results do not depend on it)", group="data", minimum=0)
    pin_memory: bool = flag(True, "page-locked host memory for batches on CUDA", group="data")
    prefetch_factor: int = flag(2, "batches that each worker loads ahead", group="data", minimum=1)
    persistent_workers: bool = flag(False, "keep the workers between epochs", group="data")

    from_weight: str = flag("none", "weights to start from: a directory in Hugging Face layout, a Hub id, or none", group="model")
    tokenizer: str | None = flag(None, "tokenizer directory or Hub id (default: that of --from_weight, else model/tokenizer)", group="model")
    chat_template: str | None = flag(None, "file with a Jinja chat template, instead of the tokenizer's own", group="model")
    hidden_size: int | None = flag(None, "width of the model, default 512", group="model", minimum=1)
    num_hidden_layers: int | None = flag(None, "layers, default 8", group="model", minimum=1)
    num_attention_heads: int | None = flag(None, "attention heads, default 8", group="model", minimum=1)
    num_key_value_heads: int | None = flag(None, "key/value heads, default half of the attention heads", group="model", minimum=1)
    intermediate_size: int | None = flag(None, "width of the MLP, default 3.25 x the hidden size, rounded up to 64", group="model", minimum=1)
    dropout: float = flag(0.0, "dropout probability while training", group="model", minimum=0, maximum=0.9)

    epochs: int = flag(2, "passes over the data", group="training", minimum=1)
    max_steps: int | None = flag(None, "steps of the whole run, replaces --epochs", group="training", minimum=1)
    batch_size: int = flag(16, "rows per rank and micro-batch", group="training", minimum=1)
    accumulation_steps: int = flag(1, "micro-batches per step", group="training", minimum=1)
    global_batch_size: int | None = flag(None, "rows per step over all ranks (default: batch_size x accumulation_steps x ranks at the first start)", group="training", minimum=1)
    learning_rate: float = flag(5e-4, "peak learning rate", group="training", above=0)
    lr_schedule: str = flag("cosine", "shape of the learning rate after warmup", group="training", choices=("cosine", "linear", "constant"))
    warmup_steps: int = flag(0, "steps of linear warmup", group="training", minimum=0)
    warmup_ratio: float = flag(0.0, "warmup as a share of all steps, instead of --warmup_steps", group="training", minimum=0, maximum=1)
    min_lr_ratio: float = flag(0.1, "last learning rate as a share of the peak", group="training", minimum=0, maximum=1)
    optimizer: str = flag("adamw", "optimizer (fused where the device has it)", group="training", choices=("adamw",))
    weight_decay: float = flag(0.01, "decay of matrices (never of norms)", group="training", minimum=0)
    adam_beta1: float = flag(0.9, "decay of the gradient mean", group="training", minimum=0, maximum=0.9999)
    adam_beta2: float = flag(0.95, "decay of the squared gradient mean", group="training", minimum=0, maximum=0.99999)
    adam_eps: float = flag(1e-8, "added to the root of the squared gradient mean", group="training", above=0)
    grad_clip: float = flag(1.0, "largest gradient norm, 0 = no clipping", group="training", minimum=0)
    label_smoothing: float = flag(0.0, "share of the target probability spread over the vocabulary", group="training", minimum=0, maximum=0.5)
    seed: int = flag(42, "seed of weights, order and dropout", group="training", minimum=0, maximum=2**63 - 1)

    device: str = flag("auto", "auto = CUDA where there is one", group="hardware", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "arithmetic under autocast; auto = bfloat16 on CUDA, float32 on CPU", group="hardware", choices=("auto", "float32", "bfloat16", "float16"))
    deterministic: bool = flag(False, "only deterministic CUDA kernels (the CPU always is)", group="hardware")
    strategy: str = flag("ddp", "ddp = every process holds the whole model, fsdp = its share of every tensor", group="hardware", choices=("ddp", "fsdp"))
    shard_size: int | None = flag(None, "processes that share one copy of the model under fsdp (default: all; processes per node = hybrid sharding)", group="hardware", minimum=2)
    cpu_offload: bool = flag(False, "keep the shards of fsdp in host memory between uses (CUDA)", group="hardware")
    gradient_checkpointing: bool = flag(False, "keep each layer's input only and compute the rest again in the backward pass", group="hardware")
    group_timeout_seconds: int = flag(120, "seconds without progress that count as a hang; before the first step 2.5 times as many", group="hardware", minimum=2)

    save_dir: str = flag("runs/full_sft", "directory of the run", group="run")
    from_resume: str = flag("0", "1 = continue from the newest good checkpoint (or start), PATH = from that one", group="run")
    overwrite: bool = flag(False, "delete the run that --save_dir holds", group="run")
    allow_change: str = flag("", f"comma-separated things that may differ on resume: {', '.join(ALLOWED_CHANGES)}", group="run")
    save_interval: str = flag("200", "save every N steps or every 'Nepoch'", group="run", interval=True)
    async_save: bool = flag(False, "write checkpoints in the background, from a copy in host memory", group="run")
    keep_last: int = flag(3, "newest checkpoints kept", group="run", minimum=2)
    save_top_k: int = flag(0, "best checkpoints kept besides; each evaluation then saves", group="run", minimum=0)
    monitor_metric: str = flag("eval/loss", "metric of an evaluation that says which are best", group="run")
    monitor_mode: str = flag("min", "whether small or large values of it are good", group="run", choices=("min", "max"))
    max_hours: float | None = flag(None, "save and stop before so many hours have passed since the start", group="run", above=0)
    eval_interval: str = flag("1epoch", "validate every N steps or every 'Nepoch'", group="run", interval=True)
    eval_at_start: bool = flag(False, "validate once before the first step", group="run")
    log_interval: str = flag("100", "log every N steps or every 'Nepoch'", group="run", interval=True)
    export_dtype: str = flag("float32", "dtype of final/", group="run", choices=("float32", "bfloat16", "float16"))
    report_to: str = flag("none", "where metrics go besides metrics.jsonl", group="run", choices=("none", "wandb"))
    use_wandb: bool = flag(False, "same as --report_to wandb", group="run")
    wandb_project: str = flag("full-sft", "project name in wandb", group="run")
    dry_run: bool = flag(False, "check everything, show one sample and the token ledger, do not train", group="run")
    # fmt: on

    def __post_init__(self) -> None:
        problems = [p for f in dataclasses.fields(self) for p in _field_problems(f, getattr(self, f.name))]
        problems += [] if problems else self._cross_problems()
        if problems:
            raise ConfigError(problems)

    def _cross_problems(self) -> list[str]:
        problems = []
        if self.val_data_path and self.val_fraction:
            problems.append("--val_data_path and --val_fraction are both given: choose one")
        if bool(self.prompt_field) != bool(self.response_field):
            problems.append("--prompt_field and --response_field belong together: give both or none")
        if self.prompt_field and self.data_format not in ("auto", "fields"):
            problems.append(f"--prompt_field names the fields of another layout than --data_format {self.data_format}")
        if self.data_format == "fields" and not self.prompt_field:
            problems.append("--data_format fields needs --prompt_field and --response_field")
        if self.system_field and not self.prompt_field:
            problems.append("--system_field needs --prompt_field and --response_field")
        if self.warmup_steps and self.warmup_ratio:
            problems.append("--warmup_steps and --warmup_ratio are both given: choose one")
        for name in ("shard_size", "cpu_offload"):
            if getattr(self, name) and self.strategy != "fsdp":
                problems.append(f"--{name} belongs to --strategy fsdp")
        if self.save_top_k and not (self.val_data_path or self.val_fraction or self.data_path == "demo"):
            problems.append("--save_top_k needs held-out data: --val_data_path or --val_fraction")
        if self.overwrite and self.from_resume != "0":
            problems.append("--overwrite 1 deletes the run that --from_resume would continue: choose one")
        for name in self.allowed_changes:
            if name not in ALLOWED_CHANGES:
                problems.append(f"--allow_change {name}: not one of {', '.join(ALLOWED_CHANGES)}")
        return problems

    @property
    def allowed_changes(self) -> list[str]:
        return [name.strip() for name in self.allow_change.split(",") if name.strip()]

    @property
    def shape(self) -> dict[str, int]:
        """The shape flags that were given."""
        return {name: getattr(self, name) for name in SHAPE_FLAGS if getattr(self, name) is not None}

    @property
    def data_options(self) -> dict[str, Any]:
        """How a data file is read."""
        return {name: getattr(self, name) for name in DATA_FLAGS}

    @property
    def data_request(self) -> dict[str, Any]:
        """Which data a run wants."""
        return {name: getattr(self, name) for name in REQUEST_FLAGS}

    @property
    def loading(self) -> dict[str, Any]:
        """How batches are loaded; none of it changes a result."""
        return {name: getattr(self, name) for name in LOADING_FLAGS}

    @property
    def reports_to_wandb(self) -> bool:
        return self.use_wandb or self.report_to == "wandb"

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def _types() -> dict[str, tuple[type, bool]]:
    """Field name -> (plain type, whether None is allowed)."""
    result = {}
    for name, hint in typing.get_type_hints(Config).items():
        plain = [t for t in typing.get_args(hint) or (hint,) if t is not type(None)][0]
        result[name] = (plain, plain is not hint)
    return result


def _convert(name: str, value: Any, plain: type, optional: bool) -> Any:
    """The value in the field's type; text from the command line and scalars from YAML alike. Raises ValueError."""
    if value is None or (optional and value == "none"):
        if optional:
            return None
        raise ValueError(f"--{name} needs a value")
    text = str(value).strip()
    if plain is bool:
        if text.lower() in ("1", "true", "yes"):
            return True
        if text.lower() in ("0", "false", "no"):
            return False
        raise ValueError(f"--{name} {value}: not 0 or 1")
    if plain is str:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            if torn := next((item for item in value if "," in item), None):
                raise ValueError(f"--{name}: the comma in {torn!r} separates names, rename the file")
            return ",".join(value)
        if isinstance(value, (list, dict)):
            raise ValueError(f"--{name} {value}: not a single value")
        return str(int(value)) if isinstance(value, bool) else str(value)
    try:
        if plain is int and isinstance(value, str) and not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError
        if isinstance(value, bool) or (isinstance(value, float) and plain is int and value != int(value)):
            raise ValueError
        return plain(value)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if plain is int else "a number"
        raise ValueError(f"--{name} {value}: not {kind}") from None


def _field_problems(f: dataclasses.Field[Any], value: Any) -> list[str]:
    m = f.metadata
    if value is None:
        return []
    if m["choices"] and value not in m["choices"]:
        return [f"--{f.name} {value}: not one of {', '.join(m['choices'])}"]
    if m["interval"] and not re.fullmatch(r"[1-9]\d*(epoch)?", value):
        return [f"--{f.name} {value}: write N (steps) or Nepoch, N a whole number from 1"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"--{f.name} {value}: not a finite number"]
    if m["minimum"] is not None and value < m["minimum"]:
        return [f"--{f.name} {value}: must be at least {m['minimum']}"]
    if m["above"] is not None and value <= m["above"]:
        return [f"--{f.name} {value}: must be greater than {m['above']}"]
    if m["maximum"] is not None and value > m["maximum"]:
        return [f"--{f.name} {value}: must be at most {m['maximum']}"]
    return []


def _not_replaced(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's values without those that say otherwise what the command line says."""
    replaced = {name for pair in ALTERNATIVES if set(pair) & given.keys() for name in pair}
    return {name: value for name, value in values.items() if name not in replaced}


def build_parser() -> argparse.ArgumentParser:
    """The command line, one flag per field; values stay text here and are converted together later."""
    parser = argparse.ArgumentParser(
        prog="train_full_sft.py",
        description="Fine-tune a language model. Runs under torchrun and as plain python; without arguments it trains "
        f"the embedded demo ({DEMO_CONFIG}).",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line wins")
    parser.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    groups: dict[str, argparse._ArgumentGroup] = {}
    types = _types()
    for f in dataclasses.fields(Config):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        plain, _ = types[f.name]
        text = f.metadata["help"].replace("%", "%%")
        if f.default is not None and f.default != "":
            text += f" (default {int(plain(f.default)) if plain is bool else f.default})"
        metavar = {bool: "0|1", int: "N", float: "X", str: "|".join(f.metadata["choices"]) or "TEXT"}[plain]
        # Flags of 0/1 also work bare; --from_resume is one of them although it takes a path too.
        bare: dict[str, Any] = {"nargs": "?", "const": "1"} if plain is bool or f.name == "from_resume" else {}
        groups[title].add_argument(f"--{f.name}", metavar=metavar, help=text, default=argparse.SUPPRESS, **bare)
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError naming the file."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Refuses a key given twice, which plain YAML loading resolves in silence, and aliases, which can multiply."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read here")
            return super().compose_node(parent, index)

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return {
            key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)
        }

    StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        loader = StrictLoader(Path(path).read_text(encoding="utf-8"))
        values = loader.get_single_data()
    except OSError as error:
        raise ConfigError([f"--config {path}: {error.strerror}"]) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError([f"--config {path}: not valid YAML: {error}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"--config {path}: expected 'flag: value' lines, found {type(values).__name__}"])
    return values


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _types(), n=1)
    return f"unknown flag --{name}" + (f" (did you mean --{near[0]}?)" if near else "")


def make_config(values: dict[str, Any]) -> Config:
    """A Config from text or plain values; unknown names get the nearest known one. Raises ConfigError with all problems."""
    types = _types()
    problems, converted = [], {}
    for name, value in values.items():
        if name not in types:
            problems.append(_unknown(str(name)))
            continue
        try:
            converted[name] = _convert(name, value, *types[name])
        except ValueError as error:
            problems.append(str(error))
    try:
        config = Config(**converted)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config


def parse_config(argv: list[str]) -> tuple[Config, bool]:
    """The configuration of a command line and whether only printing was asked for. Raises ConfigError; exits on --help."""
    known, unknown = build_parser().parse_known_args(argv)
    given = vars(known)
    path, only_print = given.pop("config"), given.pop("print_config")
    if path is None and "data_path" not in given:
        path = str(Path(__file__).resolve().parent.parent / DEMO_CONFIG)
    problems = []
    values: dict[str, Any] = {}
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    problems += [_unknown(word.lstrip("-")) for word in flags] or [f"unexpected word {word!r}" for word in unknown]
    try:
        values = read_yaml(path) if path else {}
    except ConfigError as error:
        problems += error.problems
    try:
        config = make_config({**_not_replaced(values, given), **given})
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config, only_print


def config_from_command_line(argv: list[str] | None = None) -> Config:
    """The configuration of this process; prints all problems and exits with 2, or prints the configuration and exits with 0."""
    try:
        config, only_print = parse_config(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
            print("see python train_full_sft.py --help", file=sys.stderr)
        sys.exit(2)
    if only_print:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config
