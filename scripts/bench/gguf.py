"""Does llama.cpp answer as we do? `python -m scripts.bench.gguf runs/demo runs/demo/model-f32.gguf`.

Asks both the held-out prompts of the demo, greedily. llama.cpp, which `pip install xllamacpp==2026.10.11549` brings,
gets messages: the chat template, the tokenizer and the weights are those in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from scripts.evaluate import positive, spread
from training.control.exit_codes import exit_code_of

ODD_TEXTS = (
    "I'LL we'll  two   spaces\n\n\tand\r\n lines ",
    "1234567890 3.14 1,000 ١٢٣ Ⅷ ½ x²",
    "你好，世界！ 再见。 \u3000全角　空白\u00a0nbsp\u200bzero",
    "\U0001f469\u200d\U0001f680\U0001f44d\U0001f3fd naïve e\u0301 Ångström ﬁ",
    "سلام עולם हिन्दी ไทย 한국어 カタカナ",
    "\ufeffbom \ud7ff \U0001d11e \U0010ffff \x07 \x7f",
    "<|im_start|>user\nHi<|im_end|>\n<think>\n</think> <|endoftext|>",
    "def f(x):\n    return {'a': [1, 2]}  # ok\n",
)


class LlamaCpp:
    """A GGUF file in llama.cpp, computing in float32 where the file does."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_gpu_layers, options.cpuparams.n_threads = 2048, 0, 1
        options.warmup, options.fit_params, options.verbosity = False, False, -1
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(options)
        self._ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def token_ids(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        address = f"{self._server.listening_address}/tokenize"
        with self._ask(urllib.request.Request(address, body, {"Content-Type": "application/json"})) as reply:
            return json.load(reply)["tokens"]

    def answer(self, messages: list[dict[str, Any]], max_tokens: int) -> str:
        return self._complete("chat_", {"messages": messages, "max_tokens": max_tokens})["message"]["content"]

    def likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        """The logarithms of the largest probabilities of the token after these."""
        chosen = self._complete("", {"prompt": ids, "max_tokens": 1, "logprobs": count})["logprobs"]["content"][0]
        return {entry["id"]: entry["logprob"] for entry in chosen["top_logprobs"]}

    def _complete(self, kind: str, question: dict[str, Any]) -> Any:
        handle = getattr(self._server, f"handle_{kind}completions")
        return handle({**question, "temperature": 0, "cache_prompt": False})["choices"][0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.gguf", description=__doc__.split("?")[0] + ".")
    flag = parser.add_argument
    flag("directory", metavar="DIR", type=Path, help="exported model (runs/x/final) or run (runs/x)")
    flag("file", metavar="FILE", type=Path, help="what scripts.export gguf made of it")
    flag("--limit", metavar="N", type=positive, default=50, help="prompts, spread evenly (default 50)")
    flag("--max_new_tokens", metavar="N", type=positive, default=256, help="longest answer in tokens (default 256)")
    return parser.parse_args(argv)


def compare(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """(same answers, answers, texts of the same tokens, texts); shows the answers that differ."""
    from dataset.chat import ChatRenderer
    from dataset.demo import held_out_conversations
    from model.build import exported_directory, load_tokenizer
    from model.generate import generate
    from model.loading import load_model

    directory = exported_directory(options.directory)
    model, tokenizer = load_model(directory), load_tokenizer(str(directory))
    renderer, theirs = ChatRenderer(tokenizer), LlamaCpp(options.file)
    rows = [row["messages"] for row in held_out_conversations()]
    questions = [messages[:-1] for messages in spread(rows, options.limit)]
    prompts = [renderer.prompt_ids(messages) for messages in questions]
    ids = generate(model, prompts, max_new_tokens=options.max_new_tokens, eos_token_ids=renderer.end_ids)
    same = 0
    for messages, ours in zip(questions, map(whole_text, tokenizer.batch_decode(ids)), strict=True):
        answer = whole_text(theirs.answer(messages, options.max_new_tokens))
        same += answer == ours
        if answer != ours:
            print(f"{messages[-1]['content']}\nhere       {ours!r}\nllama.cpp  {answer!r}\n")
    texts = [*ODD_TEXTS, *(message["content"] for messages in rows for message in messages)]
    alike = sum(theirs.token_ids(text) == tokenizer(text).input_ids for text in texts)
    return same, len(questions), alike, len(texts)


def whole_text(answer: str) -> str:
    """Without what a cut within a character leaves, and without outer spaces, some of which llama.cpp strips itself."""
    return answer.strip().rstrip("\ufffd").strip()


def main(argv: list[str] | None = None) -> int:
    """1 where something differs."""
    options = parse(argv)
    try:
        same, answers, alike, texts = compare(options)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error) if isinstance(error, (ValueError, OSError)) else 2
    print(f"{same} of {answers} answers and the tokens of {alike} of {texts} texts are the same")
    return int((same, alike) != (answers, texts))


if __name__ == "__main__":
    sys.exit(main())
