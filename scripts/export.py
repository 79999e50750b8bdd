"""Writes an exported model in the format of other tools: `python -m scripts.export gguf runs/full_sft`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.control.exit_codes import exit_code_of

DTYPES = ("f32", "f16", "bf16", "q8_0")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.split(":")[0] + ".")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    flag = formats.add_parser("gguf", help="one file for llama.cpp, Ollama, LM Studio").add_argument
    flag("directory", metavar="DIR", type=Path, help="exported model (runs/x/final) or run (runs/x)")
    flag("--out", metavar="FILE", type=Path, help="where to write it (default model-DTYPE.gguf in the run)")
    flag(
        "--dtype", choices=DTYPES, default="f32", help="of the matrices; q8_0 = 8 bits and a scale per 32 (default f32)"
    )
    return parser.parse_args(argv)


def export_gguf(options: argparse.Namespace) -> Path:
    """The file that was written. Raises ValueError for what llama.cpp would compute otherwise."""
    from model.build import exported_directory, load_tokenizer
    from model.decoder import Decoder
    from model.generation_config import stop_ids
    from model.loading import load_model
    from scripts.gguf import STOCK, write_gguf

    directory = exported_directory(options.directory.absolute())
    run = directory.parent if directory.name == "final" else directory
    out = options.out or run / f"model-{options.dtype}.gguf"
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory, name a file in it")
    model = load_model(directory)
    if not isinstance(model, Decoder):
        raise ValueError(f"{directory} holds {type(model.inner).__name__}, which is not written here; {STOCK}")
    tokenizer = load_tokenizer(str(directory))
    if unplaced := write_gguf(out, model, tokenizer, run.name, options.dtype, stop_ids(directory)):
        named = " ".join(tokenizer.convert_ids_to_tokens(unplaced))
        print(f"the format has no place for these stop tokens: {named}; llama.cpp stops at those it knows by name")
    return out


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        out = export_gguf(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    print(f"written to {out}: {out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
