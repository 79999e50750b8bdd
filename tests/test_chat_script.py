"""The chat shows what transformers would answer, in whole characters, and the model reads the whole conversation."""

import io
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset.chat import ChatRenderer
from model.build import OWN_TOKENIZER, load_tokenizer
from model.decoder import DecoderConfig
from model.export import export_model
from model.loading import build_model
from scripts.chat import TextStream, as_message, main

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 90
FIRST, SECOND = "Hello there", "你好，再说一遍"
LENGTH = 8


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with random weights, large enough that the answers differ from prompt to prompt.

    No answer ends, and none holds a space at which a joint encoding of the history might cut otherwise.
    """
    run = tmp_path_factory.mktemp("runs") / "run"
    config = DecoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.5,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    model, tokenizer = build_model(config, seed=10), load_tokenizer(str(OWN_TOKENIZER))
    unwanted = [token for token in range(len(tokenizer)) if tokenizer.decode([token])[:1].isspace()]
    with torch.no_grad():
        model.lm_head.weight[[*unwanted, tokenizer.eos_token_id]] = 0  # some other token is always likelier
    export_model(run / "final", model, OWN_TOKENIZER)
    return run


@pytest.fixture(scope="module", autouse=True)
def processes(run) -> dict[str, subprocess.Popen]:
    """The real program, fed by --prompt and by a pipe; both start while other tests run."""
    command = [sys.executable, "-m", "scripts.chat", str(run), "--device", "cpu", "--max_new_tokens", str(LENGTH)]
    pipes = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = {
        "--prompt": subprocess.Popen([*command, "--prompt", FIRST, "--prompt", SECOND], **pipes),
        "pipe": subprocess.Popen(command, **pipes),
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(OWN_TOKENIZER))


@pytest.fixture(scope="module")
def transformers_answer(run, tokenizer):
    """What transformers generates for messages."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "final")

    def answer(messages: list[dict], length: int = LENGTH) -> str:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=length)[
            0, prompt["input_ids"].shape[1] :
        ].tolist()
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        return tokenizer.decode(ids).rstrip("\ufffd")

    return answer


@pytest.fixture
def chat(run, capsys):
    """Runs the chat in this process; returns exit code, standard output and standard error."""

    def call(*flags: str, length: int = LENGTH) -> tuple[int, str, str]:
        code = main([str(run), "--device", "cpu", "--max_new_tokens", str(length), *flags])
        return code, *capsys.readouterr()

    return call


class Terminal:
    """Standard input and output of somebody who types `lines` and presses Ctrl-C at the given writes of the program."""

    def __init__(self, lines: list[str], interrupt_at: int | None = None):
        self.keyboard, self.screen = iter(lines), io.StringIO()
        self.writes, self.interrupt_at = 0, interrupt_at

    def isatty(self) -> bool:
        return True

    def reconfigure(self, **_: str) -> None:
        """Text already."""

    def readline(self, *_: int) -> str:
        line = next(self.keyboard, "")
        if line == "^C":
            signal.raise_signal(signal.SIGINT)
        return line + "\n" * bool(line)

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return self.screen.write(text)

    def flush(self) -> None:
        """Nothing is held back."""


def type_into(monkeypatch, *lines: str, interrupt_at: int | None = None) -> Terminal:
    terminal = Terminal(list(lines), interrupt_at)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


@pytest.fixture(scope="module")
def two_answers(transformers_answer) -> tuple[str, str]:
    first = transformers_answer([user(FIRST)])
    second = transformers_answer([user(FIRST), assistant(first), user(SECOND)])
    assert len({first, second, transformers_answer([user(SECOND)])}) == 3  # the history decides the second answer
    return first, second


def test_characters_come_whole(tokenizer):
    text = "你好，世界！ 👩‍🚀 naïve 𝄞 髒 end"
    ids = tokenizer(text).input_ids
    assert "\ufffd" in "".join(tokenizer.decode([token]) for token in ids)  # some characters take several tokens
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text and stream.rest() == ""
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)


def test_whatever_a_model_writes_comes_out_as_decoding_gives_it(tokenizer):
    rng = random.Random(0)
    bytes_and_words = [*range(9, 265), *rng.sample(range(265, 6400), 256)]
    for _ in range(100):
        ids = rng.choices(bytes_and_words, k=30)
        stream = TextStream(tokenizer)
        pieces = [stream.add(token) for token in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)


def test_reasoning_is_remembered_as_the_tokens_that_it_was(tokenizer):
    written = "<think>\nEasy.\n</think>\n\nYes."
    assert as_message(written) == assistant("Yes.") | {"reasoning_content": "Easy."}
    assert as_message("<think> unfinished") == assistant("<think> unfinished")
    assert as_message("no </think> here") == assistant("no </think> here")
    renderer = ChatRenderer(tokenizer)
    ids = tokenizer(written).input_ids
    remembered = renderer.prompt_ids([user("Sure?"), as_message(written), user("Why?")])
    assert str(ids)[1:-1] in str(remembered)
    assert renderer.prompt_ids([user("Sure?"), assistant(written), user("Why?")]) == remembered
    assert str(ids)[1:-1] not in str(renderer.prompt_ids([user(written)]))  # the words of a user are no tokens


def test_prompts_are_what_training_shows_before_an_answer(tokenizer):
    renderer = ChatRenderer(tokenizer)
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": "<|im_end|>"}}}
    messages = [
        {"role": "system", "content": "Be brief."}, user("a <|im_start|>"), assistant("  b"), user("c"),
        assistant("") | {"tool_calls": [call]}, {"role": "tool", "content": "d"}, assistant(" e"),
        user("f"), assistant("g"),
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "look"}}]
    for turn in (2, 4, 6, 8):
        sample = renderer.render(messages[: turn + 1], tools)
        prompt = renderer.prompt_ids(messages[:turn], tools)
        assert prompt == sample.ids[: len(prompt)].tolist()
        assert sample.supervised[len(prompt) :].all() and not sample.supervised[len(prompt) - 1]
    joint = tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True)["input_ids"]
    assert renderer.prompt_ids(messages[:4]) != joint  # where a forged turn would have been opened


def test_a_template_that_rewrites_earlier_answers_still_serves(run):
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [user("a"), assistant("b"), user("c")]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ChatRenderer(tokenizer).prompt_ids(messages) == whole


def test_a_system_message_is_read_first_and_survives_a_reset(chat, transformers_answer):
    system = {"role": "system", "content": "Be brief."}
    expected = transformers_answer([system, user(FIRST)])
    assert expected != transformers_answer([user(FIRST)])
    flags = ["--system", "Be brief.", "--prompt", FIRST, "--prompt", "/reset", "--prompt", FIRST]
    assert chat(*flags)[1] == f"{expected}\n" * 2


def test_draws_depend_on_the_seed_and_the_turn(chat):
    flags = ["--temperature", "5", "--top_k", "50", "--top_p", "0.99"]
    prompts = [word for text in (FIRST, "/reset", FIRST, FIRST) for word in ("--prompt", text)]
    first, again, next_turn = chat(*flags, *prompts)[1].splitlines()
    assert first == again != next_turn
    assert chat(*flags, *prompts, "--seed", "1")[1].splitlines()[0] != first


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, monkeypatch, run, transformers_answer, capsys):
    whole = transformers_answer([user(FIRST)])
    terminal = type_into(monkeypatch, FIRST, "^C", SECOND, interrupt_at=5)
    assert main([str(run), "--device", "cpu", "--max_new_tokens", str(LENGTH)]) == 0
    shown = terminal.screen.getvalue()
    part, rest = shown.removeprefix("> ").split("\n> > ")
    assert whole.startswith(part) and 0 < len(part) < len(whole)
    remembered = [user(FIRST), assistant(part), user(SECOND)]
    assert rest == transformers_answer(remembered) + "\n> "
    assert capsys.readouterr().err.count("/exit or Ctrl-D leaves") == 2  # at the start and after Ctrl-C with no answer


def test_ctrl_c_ends_a_program_that_nobody_types_into(monkeypatch, run):
    terminal = type_into(monkeypatch, interrupt_at=3)
    assert main([str(run), "--device", "cpu", "--prompt", FIRST]) == 130
    assert terminal.screen.getvalue().count("\n") == 0


def test_exit_leaves(monkeypatch, run):
    terminal = type_into(monkeypatch, "/help", "/exit", FIRST)
    assert main([str(run), "--device", "cpu"]) == 0
    assert terminal.screen.getvalue() == "> > "


def test_a_full_context_is_said(chat, monkeypatch, run, transformers_answer, tokenizer, capsys):
    code, out, err = chat("--prompt", FIRST, "--prompt", SECOND, length=500)
    prompt = len(ChatRenderer(tokenizer).prompt_ids([user(FIRST)]))
    room = CONTEXT + 1 - prompt
    assert out == transformers_answer([user(FIRST)], room) + "\n"
    assert f"[cut after {room} tokens: the context of this model, {CONTEXT} tokens, is full]" in err
    assert code == 2 and f"tokens, the context of this model only {CONTEXT}" in err
    assert "[cut after 3 tokens: --max_new_tokens]" in chat("--prompt", FIRST, length=3)[2]

    terminal = type_into(monkeypatch, "x " * CONTEXT, FIRST)
    assert main([str(run), "--device", "cpu", "--max_new_tokens", str(LENGTH)]) == 0
    assert terminal.screen.getvalue() == "> > " + transformers_answer([user(FIRST)]) + "\n> "
    assert "/reset begins a new conversation" in capsys.readouterr().err


def test_errors_say_what_to_do(chat, tmp_path, capsys):
    assert main([str(tmp_path / "absent"), "--prompt", "x"]) == 2
    assert "absent does not exist: name an exported model" in capsys.readouterr().err
    assert main([str(tmp_path), "--prompt", "x"]) == 2
    assert "has neither config.json nor final/" in capsys.readouterr().err
    code, out, err = chat("--temperature", "-1", "--prompt", "x")
    assert (code, out) == (2, "") and "temperature must be a finite number from 0, got -1.0" in err
    assert (
        chat("--temperature", "nan", "--prompt", "x")[0]
        == chat("--prompt", "")[0]
        == chat("--prompt", "\udcff")[0]
        == 2
    )
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--max_new_tokens", "0"])
    assert caught.value.code == 2


def test_the_program_answers_prompts_as_transformers_does(processes, two_answers, run):
    out, err = processes["--prompt"].communicate(timeout=120)
    assert out.decode() == f"{two_answers[0]}\n{two_answers[1]}\n"
    assert err.decode().startswith(f"{run / 'final'}: 209,488 parameters on cpu\n")
    assert processes["--prompt"].returncode == 0


def test_the_program_answers_lines_from_a_pipe(processes, two_answers):
    lines = f"{FIRST}\n\n{SECOND}\n/reset\n{FIRST}\n/what\n".encode() + b"\xff\xe4\xbd"  # no text, no end of line
    out, err = processes["pipe"].communicate(lines, timeout=120)
    answers = out.decode()
    assert answers.startswith(f"{two_answers[0]}\n{two_answers[1]}\n{two_answers[0]}\n")
    assert len(answers) > len("".join(two_answers)) + len(two_answers[0]) + 4
    assert err.decode().count("/reset forgets") == 2  # in the first line and as the answer to /what
    assert processes["pipe"].returncode == 0


# --- models that others made


LLAMA_2_LIKE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.fixture(params=["Gemma2", "Qwen2"])
def of_others(request, tmp_path):
    """A directory as transformers saves it, of a family that is built in or not, with a template of another form."""
    from transformers import AutoTokenizer

    from tests.tiny_model import foreign

    network = foreign(tmp_path / "theirs", request.param, vocab_size=6400, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(OWN_TOKENIZER)
    tokenizer.chat_template = LLAMA_2_LIKE
    tokenizer.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", network.eval(), tokenizer


def test_models_that_others_made_answer_as_in_transformers(of_others, capsys):
    directory, network, tokenizer = of_others
    prompt = tokenizer.apply_chat_template([user(FIRST)], add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        ids = network.generate(**prompt, do_sample=False, max_new_tokens=LENGTH)[0, prompt["input_ids"].shape[1] :]
    assert main([str(directory), "--device", "cpu", "--max_new_tokens", str(LENGTH), "--prompt", FIRST]) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") + "\n"


def test_a_model_without_a_template_needs_one(of_others, capsys, tmp_path):
    directory, _, tokenizer = of_others
    words = [str(directory), "--device", "cpu", "--max_new_tokens", str(LENGTH), "--prompt", FIRST]
    assert main(words) == 0
    (directory / "chat_template.jinja").unlink()
    answer = capsys.readouterr().out
    assert main(words) == 2
    assert "has no chat template" in (told := capsys.readouterr().err) and "--chat_template FILE" in told
    assert told.endswith("or one of: chatml, llama3, mistral, gemma, plain\n")
    (tmp_path / "template.jinja").write_text(LLAMA_2_LIKE)
    assert main([*words, "--chat_template", str(tmp_path / "template.jinja")]) == 0
    assert capsys.readouterr().out == answer
    assert main([*words, "--chat_template", str(tmp_path / "none.jinja")]) == 2
    assert "none.jinja: neither a file nor one of chatml, llama3" in capsys.readouterr().err
