"""What a user can set: one typed dataclass that is the command line, the YAML file and the saved config.yaml at once.

Everything that is wrong is collected and reported in one message, because a user who mends one flag per attempt is a user
who leaves. This module imports neither torch nor transformers: `--help` must be instant.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config.flags import AUTO, INTERVAL, ConfigError, convert, did_you_mean, field_problems, flag, is_day
from training.config.loss_weights import parse_loss_weights

ALLOWED_CHANGES = (
    "data",
    "template",
    "model",
    "seed",
    "schedule",
    "optimizer",
    "objective",
    "precision",
    "global_batch_size",
)


LR_SCHEDULES = (
    "cosine", "linear", "constant", "cosine_restarts", "wsd", "polynomial", "step", "multistep", "exponential",
    "one_cycle", "mini_epoch",
)  # fmt: skip
EXPERT_FLAGS = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
SHAPE_FLAGS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "qk_norm",
    "num_experts", *EXPERT_FLAGS,
)  # fmt: skip
COMMIT = re.compile("[0-9a-f]{40}")
PRESET_EXPERTS = 8  # of --use_moe; the model derives the rest

DATA_FLAGS = (
    "prompt_field", "response_field", "system_field", "max_seq_len", "overlong", "bad_rows", "data_format", "train_on",
    "text_tokens", "vanished", "template_date", "system_as",
)  # fmt: skip
REQUEST_FLAGS = (
    "data_path", "val_data_path", "val_fraction", "seed", "packing", "repack", "files_per_epoch", "file_fraction",
    "system_prompts", "system_prompt_ratio", "cache_dir", "tokenize_workers", "max_tokens",
)  # fmt: skip
ALTERNATIVES = (
    ("warmup_steps", "warmup_ratio"),
    ("val_data_path", "val_fraction"),
    ("epochs", "max_steps"),
    ("accumulation_steps", "global_batch_size"),
)
GIVES_WAY = {"stages": ("epochs", "max_steps")}  # a table counts its own epochs; what is given beside it is refused
WHOLE_TENSORS = ("adafactor", "muon")  # optimizers whose update is not the same where a tensor is shared out
LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")
LOADING_FLAGS = ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")


@dataclass
class Config:
    """Every argument of a run; names are those of the flags."""

    # fmt: off
    data_path: str = flag("demo", "training data: files, patterns, directories or Hub data sets with weights (a.jsonl:2,b.parquet:0.5), or 'demo'", group="data")
    val_data_path: str | None = flag(None, "held-out data, the same without weights", group="data")
    val_fraction: float = flag(0.0, "share of --data_path held out for validation", group="data", minimum=0, maximum=0.5)
    data_format: str = flag("auto", "layout of the rows", group="data", choices=("auto", "messages", "sharegpt", "conversations", "alpaca", "prompt", "text", "dolly", "xlam", "ultrachat", "fields"))
    train_on: str = flag("assistant", "what is trained: assistant turns, the last one, those that say so, all tokens", group="data", choices=("assistant", "last", "marked", "all"))
    text_tokens: str = flag("", "comma-separated control tokens that data may write as tokens, in any text", group="data")
    vanished: str = flag("error", "what to do where the chat template writes nothing of what would be trained", group="data", choices=("error", "warn"))
    template_date: str | None = flag(None, "day, YYYY-MM-DD, that a chat template which writes today's date is given (default: that of the first start, kept by a resume)", group="data")
    system_as: str = flag("system", "where a system message stands: user = before the text of the first question, for templates without a system role", group="data", choices=("system", "user"))
    system_prompts: str | None = flag(None, "file of system prompts, one per line, for conversations without one", group="data")
    system_prompt_ratio: float = flag(0.2, "share of those conversations that get one", group="data", above=0, maximum=1)
    prompt_field: str | None = flag(None, "name of the prompt field in rows without messages; several, separated by commas, are joined by line ends", group="data")
    response_field: str | None = flag(None, "name of the answer field in rows without messages", group="data")
    system_field: str | None = flag(None, "name of the system prompt field in rows without messages", group="data")
    max_seq_len: int = flag(1024, "tokens of a row; several samples are packed into one", group="data", minimum=2)
    packing: bool = flag(True, "lay samples end to end in rows; 0 = one sample per row (no row is ever padded)", group="data")
    repack: bool = flag(False, "lay the samples into rows afresh in each epoch", group="data")
    max_tokens: int | None = flag(None, "train only samples of at most N tokens; longer ones are counted", group="data", minimum=2)
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
    revision: str | None = flag(None, "revision of the Hub id in --from_weight (branch, tag or commit), also for its tokenizer", group="model")
    trust_remote_code: bool = flag(False, "run the code that --from_weight brings along; of a Hub id only with a commit of 40 hex digits as --revision", group="model")
    tokenizer: str | None = flag(None, "tokenizer directory or Hub id (default: that of --from_weight, else model/tokenizer)", group="model")
    chat_template: str | None = flag(None, "chat template instead of the tokenizer's own: a Jinja file, or one of ours (chatml, llama3, mistral, gemma, plain)", group="model")
    hidden_size: int | None = flag(None, "width of the model, default 512", group="model", minimum=1)
    num_hidden_layers: int | None = flag(None, "layers, default 8", group="model", minimum=1)
    num_attention_heads: int | None = flag(None, "attention heads, default 8", group="model", minimum=1)
    num_key_value_heads: int | None = flag(None, "key/value heads, default half of the attention heads", group="model", minimum=1)
    intermediate_size: int | None = flag(None, "width of the MLP, default 3.25 x the hidden size, rounded up to 64", group="model", minimum=1)
    qk_norm: bool | None = flag(None, "norm of each query and key head (Qwen3), default 0, and 1 for experts without a shared one", group="model")
    use_moe: bool = flag(False, f"a mixture of {PRESET_EXPERTS} experts in place of each MLP, as many weights per token as without", group="model")
    num_experts: int | None = flag(None, "experts of each layer (Qwen3-MoE; with a shared one Qwen2-MoE)", group="model", minimum=1)
    num_experts_per_tok: int | None = flag(None, "experts that a token passes, default 2", group="model", minimum=1)
    moe_intermediate_size: int | None = flag(None, "width of an expert, default so that those of a token are as wide as the MLP", group="model", minimum=1)
    shared_expert_intermediate_size: int | None = flag(None, "width of an expert that every token passes besides", group="model", minimum=1)
    dropout: float = flag(0.0, "dropout probability while training", group="model", minimum=0, maximum=0.9)
    init: str = flag("fan_in", "how new weights are drawn (fan_in = LeCun et al. 1998, kaiming = He et al. 2015, xavier = Glorot & Bengio 2010)", group="model", choices=("fan_in", "normal", "kaiming", "xavier"))
    lora_rank: int | None = flag(None, "freeze the weights of --from_weight and train adapters of this rank beside its linear layers (LoRA, Hu et al. 2021)", group="model", minimum=1)
    lora_alpha: int | None = flag(None, "what the adapters add is multiplied by this / rank (default: 2 x rank)", group="model", minimum=1)
    lora_targets: str = flag("", "comma-separated ends of names of linear layers, such as q_proj,v_proj (default: all but the head)", group="model")
    lora_dropout: float = flag(0.0, "dropout probability of what goes into an adapter", group="model", minimum=0, maximum=0.9)

    stages: str | None = flag(None, "table of stages (YAML or JSON), each a row of flags that replace those of the run; see docs/strategy.md", group="training")
    epochs: int = flag(2, "passes over the data", group="training", minimum=1)
    max_steps: int | None = flag(None, "steps of the whole run, replaces --epochs", group="training", minimum=1)
    batch_size: int = flag(16, "rows per rank and micro-batch; auto (or 0) = the first of 64, 32, 16 ... that fits in memory, found once before the first step", group="training", minimum=AUTO)
    accumulation_steps: int = flag(1, "micro-batches per step", group="training", minimum=1)
    global_batch_size: int | None = flag(None, "rows per step over all ranks (default: batch_size x accumulation_steps x ranks at the first start)", group="training", minimum=1)
    learning_rate: float = flag(5e-4, "peak learning rate", group="training", above=0)
    lr_schedule: str = flag("cosine", "shape of the learning rate after warmup", group="training", choices=LR_SCHEDULES)
    warmup_steps: int = flag(0, "steps of linear warmup", group="training", minimum=0)
    warmup_ratio: float = flag(0.0, "warmup as a share of all steps, instead of --warmup_steps", group="training", minimum=0, maximum=1)
    min_lr_ratio: float = flag(0.1, "last learning rate as a share of the peak (not of step, multistep, exponential, mini_epoch)", group="training", minimum=0, maximum=1)
    lr_cycles: int = flag(4, "cosine_restarts: cycles of a stage", group="training", minimum=1)
    lr_decay_ratio: float = flag(0.2, "wsd: share of the steps in which it decays, at the end", group="training", above=0, maximum=1)
    lr_power: float = flag(2.0, "polynomial: its power", group="training", above=0)
    lr_interval: str | None = flag(None, "step, exponential: every N steps, counted after the warmup, or 'Nepoch' it falls (default: 30epoch, 1epoch)", group="training", interval=True)
    lr_gamma: float | None = flag(None, "step, multistep, exponential, mini_epoch: factor of each fall (default: 0.1, 0.1, 0.95, 0.95)", group="training", above=0, maximum=1)
    lr_milestones: str = flag("", "multistep: comma-separated steps, counted after the warmup, or 'Nepoch' after which it falls", group="training")
    lr_peak_ratio: float = flag(0.3, "one_cycle: share of the steps before the peak", group="training", minimum=0, maximum=1)
    lr_start_ratio: float | None = flag(None, "one_cycle, mini_epoch: first learning rate as a share of the peak (default: 0.04, 0.1)", group="training", above=0, maximum=1)
    lr_warmup_epochs: int = flag(10, "mini_epoch: the peak is in the mini-epoch of this number", group="training", minimum=1)
    lr_adapt: str = flag("none", "multiplier of the schedule that follows --monitor_metric: cut on a plateau, or adaptive to stagnation too", group="training", choices=("none", "plateau", "adaptive"))
    adaptive_every: str | None = flag(None, "observe the mean training loss every N steps or 'Nepoch' instead of evaluations", group="training", interval=True)
    lr_adapt_patience: int = flag(50, "observations without improvement before a cut", group="training", minimum=1)
    lr_adapt_factor: float = flag(0.7, "factor of a cut on a plateau", group="training", above=0, maximum=1)
    lr_adapt_threshold: float = flag(0.001, "what counts as an improvement; variance under which a loss stagnates", group="training", minimum=0)
    lr_adapt_window: int = flag(20, "adaptive: observations in which stagnation is looked for", group="training", minimum=3)
    lr_adapt_cooldown: int | None = flag(None, "observations after a change in which nothing changes (default: plateau 0, adaptive --lr_adapt_window)", group="training", minimum=0)
    lr_adapt_boost: float = flag(1.5, "adaptive: factor where the loss stagnates", group="training", minimum=1)
    lr_adapt_drop: float = flag(0.8, "adaptive: factor after --lr_adapt_drop_patience observations without improvement", group="training", above=0, maximum=1)
    lr_adapt_drop_patience: int = flag(30, "adaptive: see --lr_adapt_drop", group="training", minimum=1)
    min_lr: float = flag(1e-6, "no cut goes below this learning rate", group="training", minimum=0)
    max_lr_factor: float = flag(3.0, "no boost goes beyond so many times the schedule", group="training", minimum=1)
    optimizer: str = flag("adamw", "optimizer of torch.optim; muon takes the matrices of the layers and leaves the rest to AdamW (muon, adafactor: not with fsdp)", group="training", choices=("adamw", "adam", "sgd", "adafactor", "muon"))
    amsgrad: bool = flag(False, "adam, adamw: divide by the largest second moment so far", group="training")
    momentum: float = flag(0.9, "sgd, muon: momentum", group="training", minimum=0, maximum=0.9999)
    weight_decay: float = flag(0.01, "decay of matrices (never of norms); in adam and sgd an L2 penalty", group="training", minimum=0)
    adam_beta1: float = flag(0.9, "decay of the gradient mean", group="training", minimum=0, maximum=0.9999)
    adam_beta2: float = flag(0.95, "decay of the squared gradient mean", group="training", minimum=0, maximum=0.99999)
    adam_eps: float = flag(1e-8, "added to the root of the squared gradient mean", group="training", above=0)
    grad_clip: float = flag(1.0, "largest gradient norm, 0 = no clipping", group="training", minimum=0)
    label_smoothing: float = flag(0.0, "share of the target probability spread over the vocabulary", group="training", minimum=0, maximum=0.5)
    loss_weights: str = flag("", "weights of loss terms: 'z=1e-4', 'aux=0.01' and 'router_z=0' (experts; these are the defaults), 'ce=1, z=linear(start, end, start_epoch, end_epoch)', exponential(start, end, decay_rate), cosine(min, max, period)", group="training", mapping=True)
    neftune_alpha: float = flag(0.0, "uniform noise on the input embeddings (NEFTune, Jain et al. 2023), 5 is common", group="training", minimum=0)
    gradient_penalty: float = flag(0.0, "weight of the squared gradient of the loss by the input embeddings (term gp)", group="training", minimum=0)
    teacher: str | None = flag(None, "model to learn from: directory, finished run or Hub id (torchrun -m scripts.train_distillation)", group="distillation")
    alpha: float | None = flag(None, "weight of the teacher; the data has 1 - X (default: 0.7)", group="distillation", minimum=0, maximum=1)
    temperature: float = flag(4.0, "softens what teacher and student say", group="distillation", above=0)
    teacher_dtype: str = flag("auto", "weights and arithmetic of the teacher; auto = as --dtype", group="distillation", choices=("auto", "float32", "bfloat16", "float16"))
    ema_decay: float | None = flag(None, "keep an exponential moving average of the weights and evaluate it too", group="training", above=0, maximum=0.999999)
    early_stopping_patience: int | None = flag(None, "stop after so many evaluations without improvement of --monitor_metric", group="training", minimum=1)
    early_stopping_min_delta: float = flag(0.001, "smallest change that counts as an improvement", group="training", minimum=0)
    seed: int = flag(42, "seed of weights, order and dropout", group="training", minimum=0, maximum=2**63 - 1)

    device: str = flag("auto", "auto = CUDA where there is one", group="hardware", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "arithmetic under autocast; auto = bfloat16 on CUDA or with --param_dtype bfloat16, else float32", group="hardware", choices=("auto", "float32", "bfloat16", "float16"))
    deterministic: bool = flag(False, "only deterministic CUDA kernels (the CPU always is)", group="hardware")
    strategy: str = flag("ddp", "ddp = every process holds the whole model, fsdp = its share of every tensor", group="hardware", choices=("ddp", "fsdp"))
    shard_size: int | None = flag(None, "processes that share one copy of the model under fsdp (default: all; processes per node = hybrid sharding)", group="hardware", minimum=2)
    cpu_offload: bool = flag(False, "keep the shards of fsdp in host memory between uses (CUDA)", group="hardware")
    param_dtype: str = flag("float32", "type of weights, gradients and optimizer state; bfloat16 takes half the memory and loses updates under 1/256 of a weight", group="hardware", choices=("float32", "bfloat16"))
    gradient_checkpointing: bool = flag(False, "keep each layer's input only and compute the rest again in the backward pass", group="hardware")
    use_compile: bool = flag(False, "compile each layer's work on single tokens once for all lengths (torch.compile); needs a C++ compiler", group="hardware")
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
    max_hours: float | None = flag(None, "save and stop before so many hours have passed since the start, pauses included", group="run", above=0)
    eval_interval: str = flag("1epoch", "validate every N steps or every 'Nepoch'", group="run", interval=True)
    eval_samples: int = flag(0, "held-out prompts that are answered for show and for eval/exact_match", group="run", minimum=0)
    eval_samples_interval: int = flag(1, "evaluations from one such show to the next", group="run", minimum=1)
    eval_at_start: bool = flag(False, "validate once before the first step", group="run")
    log_interval: str = flag("100", "log every N steps or every 'Nepoch'", group="run", interval=True)
    on_alert: str = flag("log", "what an alert of level error does (alerts.jsonl has them all): it is logged, or the run saves and stops", group="run", choices=("log", "stop"))
    report: bool = flag(True, "write report/ (report.md, plots) when the run ends", group="run")
    plot_interval: str | None = flag(None, "write it besides every N steps or 'Nepoch', in a process of its own (0 = never)", group="run", interval=True)
    export_ema: bool = flag(False, "final/ holds the moving average of --ema_decay", group="run")
    export_dtype: str = flag("float32", "dtype of final/", group="run", choices=("float32", "bfloat16", "float16"))
    report_to: str = flag("none", "where metrics go besides metrics.jsonl; all = both", group="run", choices=("none", "tensorboard", "wandb", "all"))
    use_wandb: bool = flag(False, "wandb besides what --report_to says", group="run")
    wandb_project: str = flag("full-sft", "project name in wandb", group="run")
    skip_checks: bool = flag(False, "start without a look at memory, disk, threads and packages (scripts.doctor looks closer)", group="run")
    dry_run: bool = flag(False, "check everything, show one sample and the token ledger, do not train", group="run")
    # fmt: on

    def __post_init__(self) -> None:
        problems = [p for f in dataclasses.fields(self) for p in field_problems(f, getattr(self, f.name))]
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
        if self.text_tokens and not all(self._text_tokens):
            problems.append(f"--text_tokens {self.text_tokens}: a name between two commas is blank")
        if self.template_date is not None and not is_day(self.template_date):
            problems.append(f"--template_date {self.template_date}: write a day as YYYY-MM-DD")
        if self.warmup_steps and self.warmup_ratio:
            problems.append("--warmup_steps and --warmup_ratio are both given: choose one")
        for name in ("epochs", "max_steps"):
            if self.stages is not None and getattr(self, name) != getattr(type(self), name):
                problems.append(f"--{name} is for a run without --stages, whose rows say repeats and mini_epochs")
        for name in ("shard_size", "cpu_offload"):
            if getattr(self, name) and self.strategy != "fsdp":
                problems.append(f"--{name} belongs to --strategy fsdp")
        if self.optimizer in WHOLE_TENSORS and self.strategy == "fsdp":
            problems.append(
                f"--optimizer {self.optimizer} needs whole tensors, which --strategy fsdp shares out: take --strategy "
                "ddp, or --optimizer adamw"
            )
        if self.amsgrad and self.optimizer not in ("adam", "adamw"):
            problems.append("--amsgrad belongs to --optimizer adam or adamw")
        if self.init != "fan_in" and self.from_weight != "none":
            problems.append(f"--init {self.init} draws new weights, and --from_weight {self.from_weight} has some")
        local = self.from_weight == "none" or Path(self.from_weight).is_dir()
        if self.revision and local:
            problems.append(f"--revision {self.revision} is of a Hub id, and --from_weight {self.from_weight} is none")
        if self.trust_remote_code and self.from_weight == "none":
            problems.append("--trust_remote_code needs --from_weight, which brings the code along")
        if self.trust_remote_code and not local and not COMMIT.fullmatch(self.revision or ""):
            problems.append(
                f"--trust_remote_code runs what {self.from_weight} holds: name the commit that you have read, --revision "
                f"with 40 hex digits, not {self.revision}"
            )
        if not (self.use_moe or self.num_experts) and self.from_weight == "none":
            given = [name for name in EXPERT_FLAGS if getattr(self, name) is not None]
            problems += [f"--{name} needs --num_experts or --use_moe 1" for name in given]
        if self.lora_rank is not None and self.from_weight == "none":
            problems.append(
                f"--lora_rank {self.lora_rank} adapts a model that is trained already: name one with --from_weight"
            )
        elif self.lora_rank is None:
            problems += [f"--{name} needs --lora_rank" for name in LORA_FLAGS[1:] if name in self.given]
        needs_held_out = {
            "save_top_k": self.save_top_k, "early_stopping_patience": self.early_stopping_patience,
            "eval_samples": self.eval_samples,
            "lr_adapt": self.lr_adapt != "none" and not self.adaptive_every,
        }  # fmt: skip
        if not (self.val_data_path or self.val_fraction or self.data_path == "demo"):
            for name in (name for name, wanted in needs_held_out.items() if wanted):
                problems.append(f"--{name} needs held-out data: --val_data_path or --val_fraction")
        if self.gradient_penalty and (self.gradient_checkpointing or self.strategy == "fsdp"):
            problems.append("--gradient_penalty goes neither with --gradient_checkpointing nor with --strategy fsdp")
        if self.gradient_penalty and self.use_compile:
            problems.append("--gradient_penalty differentiates twice, which --use_compile does not allow: choose one")
        if self.batch_size == AUTO and self.strategy == "fsdp":
            problems.append(
                "--batch_size auto tries until memory runs out, and under --strategy fsdp the other processes would "
                "wait for the one where it did: give a number"
            )
        if self.param_dtype == "bfloat16" and self.dtype not in ("auto", "bfloat16"):
            reason = "weights in bfloat16 are not computed in float32"
            reason = "float16 cannot hold what bfloat16 can" if self.dtype == "float16" else reason
            problems.append(f"--param_dtype bfloat16 goes with --dtype bfloat16 or auto: {reason}")
        if self.eval_samples and self.strategy == "fsdp":
            problems.append("--eval_samples: sharded models answer nothing here, use scripts.evaluate on final/")
        if self.export_ema and self.ema_decay is None:
            problems.append("--export_ema needs --ema_decay")
        if self.lr_schedule == "multistep" and not self.lr_milestones.strip():
            problems.append("--lr_schedule multistep needs --lr_milestones")
        milestones = [part.strip() for part in self.lr_milestones.split(",") if part.strip()]
        for each in milestones:
            if not INTERVAL.fullmatch(each):
                problems.append(f"--lr_milestones {each}: write N (steps) or Nepoch, N a whole number from 1")
        if len(set(milestones)) < len(milestones):
            problems.append(f"--lr_milestones {self.lr_milestones}: one of them is given twice")
        if self.lr_schedule == "one_cycle" and self.lr_peak_ratio == 1.0:
            problems.append("--lr_peak_ratio 1 leaves no step for the way down: must be less than 1")
        try:
            parse_loss_weights(self.loss_weights)
        except ValueError as error:
            problems.append(str(error))
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
    def keep_best(self) -> int:
        """Checkpoints kept for their metric: one at least where a run may end because it got no better."""
        return self.save_top_k or int(self.early_stopping_patience is not None)

    @property
    def given(self) -> dict[str, Any]:
        """The flags that are not as they would be anyway."""
        found = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return {name: value for name, value, default in found if value != default}

    @property
    def shape(self) -> dict[str, int]:
        """The shape flags that were given."""
        preset = {"num_experts": PRESET_EXPERTS} if self.use_moe else {}
        return preset | {name: getattr(self, name) for name in SHAPE_FLAGS if getattr(self, name) is not None}

    @property
    def model_request(self) -> dict[str, Any]:
        """Which model a run trains."""
        names = ("from_weight", "dropout", "seed", "init", "param_dtype", "revision", "trust_remote_code")
        return {**{name: getattr(self, name) for name in names}, "shape": self.shape, "lora": lora_of(vars(self))}

    @property
    def data_options(self) -> dict[str, Any]:
        """How a data file is read."""
        return {name: getattr(self, name) for name in DATA_FLAGS} | {"text_tokens": self._text_tokens}

    @property
    def _text_tokens(self) -> tuple[str, ...]:
        return tuple(token.strip() for token in self.text_tokens.split(",")) if self.text_tokens else ()

    @property
    def data_request(self) -> dict[str, Any]:
        """Which data a run wants."""
        return {name: getattr(self, name) for name in REQUEST_FLAGS}

    @property
    def loading(self) -> dict[str, Any]:
        """How batches are loaded; none of it changes a result."""
        return {name: getattr(self, name) for name in LOADING_FLAGS}

    @property
    def reporters(self) -> list[str]:
        """Where metrics go besides metrics.jsonl: names of training/records/sinks.py."""
        wanted = {"none": (), "all": ("tensorboard", "wandb")}.get(self.report_to, (self.report_to,))
        return sorted({*wanted, *(("wandb",) if self.use_wandb else ())})

    def to_yaml(self) -> str:
        import yaml

        values = dataclasses.asdict(self) | ({"batch_size": "auto"} if self.batch_size == AUTO else {})
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def lora_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters that the flags of a run, of an older version too, ask for; empty where they ask for none."""
    if not settings.get("lora_rank"):
        return {}
    values = {name.removeprefix("lora_"): settings[name] for name in LORA_FLAGS}
    return {**values, "alpha": values["alpha"] or 2 * values["rank"]}


def field_types() -> dict[str, tuple[type, bool]]:
    """Field name -> (plain type, whether None is allowed)."""
    result = {}
    for name, hint in typing.get_type_hints(Config).items():
        plain = [t for t in typing.get_args(hint) or (hint,) if t is not type(None)][0]
        result[name] = (plain, plain is not hint)
    return result


def unknown_flag(name: str) -> str:
    return f"unknown flag --{name}{did_you_mean(name, field_types(), '--')}"


def compute_dtype(dtype: str, param_dtype: str, on_gpu: bool) -> str:
    """What --dtype means: auto is bfloat16 on CUDA and where the weights are in it, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_gpu or param_dtype == "bfloat16" else "float32"


def make_config(values: dict[str, Any]) -> Config:
    """A Config from text or plain values; unknown names get the nearest known one. Raises ConfigError with all problems."""
    types = field_types()
    mappings = {f.name: f.metadata["mapping"] for f in dataclasses.fields(Config)}
    problems, converted = [], {}
    for name, value in values.items():
        if name not in types:
            problems.append(unknown_flag(str(name)))
            continue
        try:
            converted[name] = convert(name, value, *types[name], mappings[name])
        except ValueError as error:
            problems.append(str(error))
    try:
        config = Config(**converted)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config


def overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Flags over those of a file, or of a file over those of its base; a flag replaces also its alternative."""
    replaced = {name for pair in ALTERNATIVES if set(pair) & over.keys() for name in pair}
    replaced |= {other for name, others in GIVES_WAY.items() if name in over for other in others}
    return {**{name: value for name, value in under.items() if name not in replaced}, **over}
