"""What is never loaded, whoever offers it: weights and tokenizers that are programs, or that point elsewhere.

A pickle runs whatever it says while it is read, and a repository may name code of its own. Both are refused here,
before transformers looks at the files: it can be talked into them in more ways than one argument closes. The code of a
repository runs only where the user asks for it (`Trust`), a pickle never.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # the first is torch.save's
SHARD = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")


class UnsafeModelError(ValueError):
    """Weights or a tokenizer that would run code, or reach outside their directory."""

    exit_code = 77


@dataclass(frozen=True)
class Trust:
    """What the user said of a place: which revision of a Hub repository, and whether its code may run."""

    revision: str | None = None
    code: bool = False

    def options(self) -> dict[str, Any]:
        """What transformers is told, here alone."""
        return dict(revision=self.revision or "main", code_revision=self.revision, trust_remote_code=self.code)


NO_TRUST = Trust()


def refuse_unsafe_weights(source: str | Path, trust: Trust = NO_TRUST) -> None:
    """Raises UnsafeModelError for a directory or Hub id whose weights are pickles, elsewhere, or need its own code."""
    _never_ask(trust)
    config, index = read_json(source, "config.json", trust), read_json(source, "model.safetensors.index.json", trust)
    _refuse_code_elsewhere(source, config, trust)
    if isinstance(named := config.get("auto_map"), dict) and "AutoModelForCausalLM" in named and not trust.code:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if str(config.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise UnsafeModelError(
                f"the model in {source} needs code of its own ({named}), which is not run unless --trust_remote_code "
                "says so"
            )
    shards = index.get("weight_map", {})
    if outside := [name for name in (shards.values() if isinstance(shards, dict) else [shards]) if not _is_shard(name)]:
        raise UnsafeModelError(f"{source}: its index names {outside[0]!r}, which is no safetensors file beside it")
    if read_json(source, "adapter_config.json", trust):
        raise UnsafeModelError(f"{source} holds an adapter, whose base may be anywhere: merge it into its base first")
    if not Path(source).is_dir():
        return  # of the Hub only safetensors are asked for
    files = sorted(Path(source).glob("*.safetensors"))
    pickles = [file for pattern in PICKLES for file in sorted(Path(source).glob(pattern))]
    if pickles and not files:
        raise UnsafeModelError(
            f"{pickles[0]} is a pickle, which runs what it says while it is read; only safetensors are loaded: convert "
            "it where you trust it"
        )
    for file in files:
        with file.open("rb") as opened:
            start = opened.read(9)  # of safetensors the length of a header, which begins with a brace
            if start.startswith(PICKLE_STARTS) and not start.endswith(b"{"):
                raise UnsafeModelError(f"{file} is a pickle under another name; only safetensors are loaded")


def refuse_unsafe_tokenizer(source: str | Path, trust: Trust = NO_TRUST) -> None:
    """Raises UnsafeModelError where the class of a tokenizer is none: transformers would load whatever it is told."""
    _never_ask(trust)
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for file in ("tokenizer_config.json", "config.json"):
        config = read_json(source, file, trust)
        _refuse_code_elsewhere(source, config, trust)
        name = config.get("tokenizer_class")
        known = tokenizer_class_from_name(name) if isinstance(name, str) else None
        if known is not None and not (isinstance(known, type) and issubclass(known, PreTrainedTokenizerBase)):
            raise UnsafeModelError(f"{source}: {file} names {name!r} as its tokenizer, which is something else")


def read_json(source: str | Path, name: str, trust: Trust = NO_TRUST) -> dict[str, Any]:
    """The object in a file of a directory or Hub id, empty where there is no such file. Raises ValueError."""
    from transformers.utils import cached_file

    with contextlib.suppress(OSError):  # no such repository, no network: whoever loads the weights says it better
        if file := cached_file(source, name, revision=trust.revision, _raise_exceptions_for_missing_entries=False):
            return read_object(Path(file))
    return {}


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a JSON object is needed, not a {type(content).__name__}")
    return content


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and SHARD.fullmatch(name) is not None


def _refuse_code_elsewhere(source: str | Path, config: dict[str, Any], trust: Trust) -> None:
    """Raises UnsafeModelError for code of another repository, which the user has not spoken of."""
    named = json.dumps(config.get("auto_map"))
    if trust.code and "--" in named:
        raise UnsafeModelError(f"{source} names code of another repository ({named}), which is never run")


def _never_ask(trust: Trust) -> None:
    """Classes that are loaded by others do without our `trust_remote_code`; then a pipe could say yes for the user."""
    from transformers import dynamic_module_utils
    from transformers.utils import HF_MODULES_CACHE

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    if trust.code:  # each process has its own copy of the code, or one could read what another is just writing
        place = Path(os.environ.get("HF_MODULES_CACHE", HF_MODULES_CACHE))
        dynamic_module_utils.HF_MODULES_CACHE = str(place / f"rank{os.environ.get('LOCAL_RANK', 0)}")
