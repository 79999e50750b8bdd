"""Tokenizers for the chat templates of the table: bytes with a family's own tokens, or a real vocabulary with them."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.build import OWN_TOKENIZER, load_tokenizer

DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
LLAMA3 = ("<|eot_id|>", "<|begin_of_text|>")
# a part of the template's name, the vocabulary that fits (GGUF), end and beginning of a sequence; the first that fits
FAMILIES = (
    ("phi-?3", "phi-3", "<|endoftext|>", "<s>"),
    ("gemma", "llama-spm", "<eos>", "<bos>"),
    ("hermes", "llama-bpe", "<|im_end|>", "<|begin_of_text|>"),
    ("idefics3", "llama-bpe", "<end_of_utterance>", "<|begin_of_text|>"),
    ("distill.llama", "llama-bpe", *DEEPSEEK),
    ("distill", "qwen2", *DEEPSEEK),
    ("llama-?3|functionary|firefunction|llama_3", "llama-bpe", *LLAMA3),
    ("deepseek.?v?", "deepseek-llm", *DEEPSEEK),
    ("granite", "starcoder", "<|end_of_text|>", "<|end_of_text|>"),
    ("bielik", "llama-spm", "<|im_end|>", "<s>"),
    ("mistral|devstral|ministral|llava", "qwen2", "</s>", "<s>"),
    ("apriel", "qwen2", "<|end|>", "<s>"),
    ("apertus", "qwen2", "<|assistant_end|>", "<s>"),
    ("glm", "qwen2", "<|endoftext|>", None),
    ("kimi", "qwen2", "[EOS]", "[BOS]"),
    ("gpt-?oss", "gpt-2", "<|return|>", "<|startoftext|>"),
    ("cohere|command", "qwen2", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    ("gigachat", "qwen2", "</s>", "<s>"),
    ("lfm", "qwen2", "<|im_end|>", "<|startoftext|>"),
    ("nemotron-nano-v2", "qwen2", "<SPECIAL_12>", "<s>"),
    ("nemotron", "qwen2", "<|im_end|>", "<s>"),
    ("muse", "llama-bpe", "<|eot|>", "<|begin_of_text|>"),
    ("seed-oss", "qwen2", "<seed:eos>", "<seed:bos>"),
    ("minimax", "qwen2", None, "]~!b["),
    ("hy3", "qwen2", "<｜hy_eos:opensource｜>", "<｜hy_begin_of_sentence:opensource｜>"),
    ("rwkv", "falcon", None, None),
    ("spark", "qwen2", "<｜end▁of▁sentence｜>", "<｜start▁of▁sentence｜>"),
    ("stepfun|minicpm", "deepseek-llm", "<|im_end|>", "<｜begin▁of▁sentence｜>"),
    ("solar", "qwen2", "<|endoftext|>", "<|startoftext|>"),
    ("smolvlm", "gpt-2", "<end_of_utterance>", "<|im_start|>"),
    ("qwen3.5|qwen3.6", "qwen35", "<|im_end|>", None),
    ("qwen|qwq|mimo|smollm", "qwen2", "<|im_end|>", None),
    ("reka", "qwen2", "<|endoftext|>", "<|endoftext|>"),
    ("", "qwen2", None, None),
)
TAGS = ("think", "tool_calls", "tool_call", "tool_sep", "arg_key", "arg_value", "tool_responses", "tool_response")
# marks that a template puts together from pieces, or that look like the tags which other templates write as text
MORE_MARKS = {
    "laguna": ["<system>", "</system>", "<user>", "</user>", "<assistant>", "</assistant>", "〈|EOS|〉"],
    "hy3": [
        *(f"<｜hy_{name}:opensource｜>" for name in ("User", "Assistant", "eos", "begin_of_sentence", "pad")),
        "<｜reasoning_mode:opensource｜>",
        *(f"<{slash}{name}:opensource>" for name in TAGS for slash in ("", "/")),
    ],
    "minimax": [
        *("<beginning_of_sentence>", "<end_of_sentence>", "]~!b[", "]~b]", "[e~[", "]<]minimax[>["),
        *("<mm:think>", "</mm:think>", "<minimax:tool_call>", "</minimax:tool_call>"),
    ],
    "deepseek-v": ["｜DSML｜"],
    "glm": ["[gMASK]", "<sop>"],
    "ling": ["<role>", "</role>"],
    "smolvlm|idefics3": ["<end_of_utterance>"],
    "cohere": ["<BOS_TOKEN>"],
}
MARK = re.compile(
    r"<\|[^<>|\s{}]{1,40}\|>|<｜[^<>｜\s{}]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|\[/?[A-Z][A-Z_]+\]|<seed:[a-z]+>|"
    r"<SPECIAL_\d+>|<sep>|<(?:start|end)_of_turn>|</?(?:think|tool_calls?|tool_response|arg_key|arg_value|seed:\w+)>"
)
ORDINARY = re.compile(r"</?(?:\w+:)?(?:think|tool_calls?|tool_responses?|tool_sep|arg_key|arg_value)(?::\w+)?>")
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]


@dataclass(frozen=True)
class Case:
    """A tokenizer with its template, the template's twin with generation marks where there is one."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    twin: str | None = None
    marks: tuple[str, ...] = ()


def family_of(name: str) -> tuple[str, str | None, str | None]:
    """Vocabulary, end and beginning of a sequence that fit a template's name."""
    return next(facts for part, *facts in FAMILIES if re.search(part, name.lower()))  # type: ignore[return-value]


def marks_of(name: str, template: str) -> list[str]:
    """What the models of a template have as tokens of their own, in the order in which the template names them."""
    written = [mark for part, marks in MORE_MARKS.items() if re.search(part, name.lower()) for mark in marks]
    eos_bos = [mark for mark in family_of(name)[1:] if mark]
    return list(dict.fromkeys([*written, *MARK.findall(template), *eos_bos]))


def byte_tokenizer(name: str, template: str) -> PreTrainedTokenizerFast:
    """Bytes, some pairs of white space, and the marks of a family: no vocabulary to download, and any text fits."""
    rest = [value for value in range(256) if value not in BYTES]
    letters = {value: chr(value) for value in BYTES} | {value: chr(256 + at) for at, value in enumerate(rest)}
    pairs = [(letters[left], letters[right]) for left, right in ((10, 10), (10, 32), (32, 32))]
    vocabulary = {letter: value for value, letter in letters.items()}
    for left, right in pairs:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return with_marks(backend, name, template)


def piece_tokenizer(name: str, template: str) -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece makes it: a text begins with a space of its own, and unknown letters are bytes."""
    letters = [chr(value) for value in range(33, 127)] + ["▁"]
    pairs = [("▁", "▁"), ("▁", "P"), ("▁", "C"), ("▁", "w"), ("a", "r"), ("i", "n")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *letters]
    vocabulary = {word: at for at, word in enumerate([*words, *(left + right for left, right in pairs)])}
    model = models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
    return with_marks(backend, name, template, unk_token="<unk>")


def with_marks(backend: Tokenizer, name: str, template: str, **special: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of a vocabulary with the template and those of its marks that the vocabulary lacks."""
    _, eos, bos = family_of(name)
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [mark for mark in marks_of(name, template) if mark not in have]
    backend.add_tokens([AddedToken(mark, special=not ORDINARY.match(mark), normalized=False) for mark in missing])
    special |= {"eos_token": eos or special.get("eos_token") or "<|endoftext|>"}
    special |= {"bos_token": bos or special.get("bos_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: token for key, token in special.items() if token}
    )
    tokenizer.chat_template = template
    tokenizer.name_or_path = name
    return tokenizer


@lru_cache
def vocabulary(directory: Path, name: str) -> tuple[str, dict[str, str]]:
    """The backend of a GGUF vocabulary as JSON, and its special tokens."""
    loaded: Any = AutoTokenizer.from_pretrained(directory, gguf_file=f"ggml-vocab-{name}.gguf")
    names = {key: str(token) for key, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    return loaded.backend_tokenizer.to_str(), names


def twins() -> Iterator[Case]:
    """The templates that ship in trl with a twin that marks what the assistant says, and the kit's own."""
    folder = importlib.resources.files("trl") / "chat_templates"
    files = {file.name: file for file in folder.iterdir() if file.name.endswith(".jinja")}
    own: Any = load_tokenizer(str(OWN_TOKENIZER))
    yield Case("the kit's own", own, marks=tuple(marks_of("", own.chat_template)))
    for file in sorted(files):
        if (twin := file.replace(".jinja", "_training.jinja")) not in files:
            continue
        name, template = file.removesuffix(".jinja"), files[file].read_text(encoding="utf-8")
        made = {name: byte_tokenizer(name, template)}
        if name in ("qwen3", "llama3"):  # as their base models have it: another token ends a text
            made[f"{name}, base"] = other = byte_tokenizer(name, template)
            other.add_special_tokens({"eos_token": "<|endoftext|>"})
        if name in ("gemma", "phi3", "llava_next"):
            made[f"{name}, SentencePiece"] = piece_tokenizer(name, template)
        for title, tokenizer in made.items():
            marks = tuple(marks_of(name, template))
            yield Case(title, tokenizer, files[twin].read_text(encoding="utf-8"), marks)


def real(directory: Path, only: str = "") -> Iterator[Case]:
    """A directory's `templates/*.jinja` on the vocabularies beside them, one vocabulary after the other."""
    files = sorted((directory / "templates").glob("*.jinja"), key=lambda file: (family_of(file.stem)[0], file.stem))
    for file in files:
        if re.search(only, file.stem):
            template = file.read_text(encoding="utf-8")
            backend, special = vocabulary(directory, family_of(file.stem)[0])
            tokenizer = with_marks(Tokenizer.from_str(backend), file.stem, template, **special)
            yield Case(file.stem, tokenizer, marks=tuple(marks_of(file.stem, template)))


def added(tokenizer: PreTrainedTokenizerFast) -> dict[int, AddedToken]:
    """The added tokens that are more than runs of space, by id."""
    tokens = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {number: token for number, token in tokens.items() if token.content.strip()}
