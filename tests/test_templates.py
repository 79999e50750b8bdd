"""The families of chat templates in use: ids and mask are those that transformers finds by `{% generation %}` tags."""

import gc
import random
import re
import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset.sandbox
from dataset.chat import ChatRenderer
from dataset.errors import RowError, UnsafeDataError
from dataset.reader import Conversation
from dataset.sandbox import limits
from dataset.template import ChatTemplate, Request, looks_only_back
from model.build import OWN_TOKENIZER, load_tokenizer
from tests.test_chat import CONTROLS, PLAIN, byte_tokenizer, random_conversation

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}
{%- elif message.role == 'assistant' %}
{%- generation %}{{- ' ' + message.content | trim + eos_token }}{% endgeneration %}
{%- else %}{{- '[INST] ' + (ns.system if loop.first or loop.index == 2 else '') + message.content + ' [/INST]' }}
{%- endif %}
{%- endfor %}"""

QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{%- if loop.index0 > ns.last and message.reasoning_content %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

FAMILIES = {
    "ChatML": (CHATML, CONTROLS, "<|im_end|>"),
    "Llama 3": (
        LLAMA3,
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
    ),
    "Mistral": (MISTRAL, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
    "Qwen 3": (QWEN3, CONTROLS, "<|im_end|>"),
}
own = load_tokenizer(str(OWN_TOKENIZER))
WORDS = ["red", "Zürich", "12", "你好", "it's", "\n\n-", "😀", "{x}", "user", "assistant\n"]


def tokenizer_of(family: str) -> Any:
    """The family's tokenizer, without the tags that only the oracle may see."""
    template, controls, eos = FAMILIES[family]
    plain = re.sub(r"\{%-? (end)?generation %\}", "", template)
    tokenizer = byte_tokenizer(plain, eos, controls=controls)
    if controls[1] in ("<s>", "<|begin_of_text|>"):
        tokenizer.bos_token = controls[1]
    return tokenizer


def oracle(tokenizer: Any, family: str, messages: list[dict]) -> tuple[list[int], list[bool]]:
    found = tokenizer.apply_chat_template(
        messages, chat_template=FAMILIES[family][0], return_assistant_tokens_mask=True, return_dict=True
    )
    return found["input_ids"], [bool(flag) for flag in found["assistant_masks"]]


def without_tools(messages: list[dict]) -> list[dict]:
    return [m for m in messages if m["role"] != "tool" and "tool_calls" not in m]


@pytest.mark.parametrize("family", ["ChatML", "Llama 3", "Mistral"])
def test_ids_and_mask_are_those_of_the_generation_tags(family):
    tokenizer, rng = tokenizer_of(family), random.Random(0)
    renderer = ChatRenderer(tokenizer)
    for _ in range(100):
        messages = without_tools(random_conversation(rng, WORDS))
        sample = renderer.render(messages)
        ids, mask = oracle(tokenizer, family, messages)
        assert sample.ids.tolist() == ids[: len(sample.ids)]
        assert sample.supervised.tolist() == mask[: len(sample.ids)]
        assert not any(mask[len(sample.ids) :])
        assert sample.supervised[-1] and not sample.supervised[0]


def test_a_template_that_drops_earlier_reasoning_gives_each_turn_as_generation_would_write_it():
    tokenizer, rng = tokenizer_of("Qwen 3"), random.Random(0)
    renderer, several = ChatRenderer(tokenizer), 0
    for _ in range(100):
        messages = without_tools(random_conversation(rng, WORDS))
        for message in messages:
            if message["role"] == "assistant" and rng.random() < 0.6:
                message["reasoning_content"] = "hm, " + rng.choice(WORDS)
        (samples,) = renderer.render_batch([Conversation(1, messages)])
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        rewritten = any("reasoning_content" in messages[turn] for turn in turns[:-1])
        assert len(samples) == (len(turns) if rewritten else 1)
        several += rewritten
        for sample, turn in zip(samples, turns if rewritten else turns[-1:], strict=True):
            ids, mask = oracle(tokenizer, "Qwen 3", messages[: turn + 1])
            assert sample.ids.tolist() == ids[: len(sample.ids)]
            start = len(mask) - mask[::-1].index(True) - 1  # the last token of the last turn
            while start and mask[start - 1]:
                start -= 1
            expected = mask if not rewritten else [flag and at >= start for at, flag in enumerate(mask)]
            assert sample.supervised.tolist() == expected[: len(sample.ids)]
    assert several > 20


# ---------------------------------------------------------------------------------------------------------------------
# One rendering tells what many tell

LOOP = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
END = "{% if add_generation_prompt %}assistant: {% endif %}"
AHEAD = [
    LOOP.replace("{{ message.role }}", "{{ loop.last }}"),
    LOOP.replace("{{ message.role }}", "{{ loop['last'] }}"),
    LOOP.replace("{{ message.role }}", "{{ loop | attr('last') }}"),
    LOOP.replace("{{ message.role }}", "{{ loop.revindex }}"),
    LOOP.replace("{{ message.role }}", "{{ loop.nextitem.role }}"),
    LOOP.replace("{{ message.role }}", "{{ messages[loop.index0 + 1].role }}"),
    LOOP.replace("{{ message.role }}", "{% for x in [loop.length] %}{{ x }}{% endfor %}"),
    LOOP.replace("in messages", "in messages[1:]"),
    LOOP.replace("in messages", "in messages | reverse"),
    LOOP.replace("in messages", "in messages if message.role != 'tool'"),
    "{% set all = messages %}" + LOOP,
    "{% set all = messages or [] %}" + LOOP,
    "{{ messages | length }}" + LOOP,
    "{{ messages[-1].role }}" + LOOP,
    "{{ messages[0:].__len__() }}" + LOOP,
    "{% macro m() %}{{ messages | length }}{% endmacro %}{{ m() }}" + LOOP,
    "{% macro m(x) %}{{ x.last }}{% endmacro %}" + LOOP.replace("{{ message.role }}", "{{ m(loop) }}"),
    LOOP + LOOP,
    LOOP + "{{ messages[0].role }}",
    "{% set ns = namespace(n=0) %}" + LOOP.replace("{{ message.role }}", "{% set ns.n = ns.n + 1 %}") + "{{ ns.n }}",
    "{% if true %}" + LOOP + "{% endif %}",
    "{% set text %}" + LOOP + "{% endset %}{{ text }}",
    LOOP + "{{ strftime_now('%Y') }}",
]
BACK = [
    LOOP,
    "{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + LOOP,
    "{% set ns = namespace(n=0) %}" + LOOP.replace("{{ message.role }}", "{% set ns.n = ns.n + 1 %}{{ ns.n }}"),
    LOOP.replace("{{ message.role }}", "{% for c in message.tool_calls or [] %}{{ loop.last }}{% endfor %}"),
    LOOP.replace("{{ message.role }}", "{{ loop.index }}{{ loop.first }}{{ loop.previtem.role if not loop.first }}"),
]


def test_templates_that_may_look_ahead_are_told_from_those_that_cannot():
    assert [template for template in AHEAD if looks_only_back(template + END)] == []
    assert [template for template in BACK if not looks_only_back(template + END)] == []
    assert looks_only_back(own.chat_template) and looks_only_back(tokenizer_of("Llama 3").chat_template)
    assert not looks_only_back(tokenizer_of("Qwen 3").chat_template)


def prefixes(tokenizer: Any, messages: list[dict], tools: Any) -> list[tuple[str, bool] | str]:
    """The text of each number of first messages, and whether that of all begins with it."""
    try:
        rendering = ChatTemplate(tokenizer).rendering(messages, Request(tools))
    except (RowError, UnsafeDataError) as error:
        return [str(error)]
    found: list[tuple[str, bool] | str] = []
    for count in range(1, len(messages)):
        for prompt in (False, True):
            try:
                prefix = rendering.prefix(count, prompt)
                found.append((prefix.part(0, len(prefix)), prefix.is_in_whole(len(prefix))))
            except RowError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("template", [*AHEAD, *BACK, PLAIN, own.chat_template])
def test_the_places_found_in_one_rendering_are_those_of_a_rendering_for_each(template, monkeypatch):
    rng = random.Random(0)
    tokenizer = byte_tokenizer(template if "add_generation_prompt" in template else template + END)
    conversations = [random_conversation(rng, WORDS) for _ in range(40)]
    tools = [None, [{"type": "function", "function": {"name": "look"}}]]
    quick = [prefixes(tokenizer, messages, tools[at % 2]) for at, messages in enumerate(conversations)]
    monkeypatch.setattr("dataset.template.looks_only_back", lambda source: False)
    assert [prefixes(tokenizer, messages, tools[at % 2]) for at, messages in enumerate(conversations)] == quick
    if template not in AHEAD:
        assert all(text[1] is True for found in quick for text in found[::2])  # without a prompt for the next


# ---------------------------------------------------------------------------------------------------------------------
# Any text comes back

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<tool_call>", " \n ", "\U000f0000", "\x00", "<|im_<|im_end|>end|>"]
)
ANSWERS = TEXTS.filter(lambda text: text.strip())
CONVERSATIONS = st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4)
RENDERERS = {
    "bytes": (byte_tokenizer(), ChatRenderer(byte_tokenizer())),
    "built-in": (own, ChatRenderer(own)),
}


@pytest.mark.parametrize("which", RENDERERS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(pairs=CONVERSATIONS, system=st.none() | TEXTS)
def test_any_text_is_trained_as_it_was_written(which, pairs, system):
    tokenizer, renderer = RENDERERS[which]
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = renderer.render(messages)

    def text_of(ids):
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(text_of(sample.ids))
    assert text_of(sample.ids[sample.supervised]) == "".join(answer + "<|im_end|>" for _, answer in pairs)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (sample.ids == end).sum() == len(messages)  # what the text spells is text
    assert sample.ids[-1] == end and sample.supervised[-1]


def test_the_time_limit_never_goes_off_in_the_lines_that_end_it(monkeypatch, request):
    """A second alarm there would leave the block by an error that nobody knows, and its timers running."""
    gc.disable()  # an alarm in somebody's callback of the collector is lost, with a warning
    request.addfinalizer(gc.enable)
    monkeypatch.setattr(dataset.sandbox, "SECONDS", 0.01)
    set_timer = signal.setitimer
    monkeypatch.setattr(signal, "setitimer", lambda which, first, again=0.0: set_timer(which, first, again and 0.001))

    def unwinds_slowly(depth):
        try:
            while depth == 500:
                pass
            unwinds_slowly(depth + 1)
        finally:
            sum(range(3000))

    for _ in range(100):
        with pytest.raises(UnsafeDataError, match="took more than"), limits():
            unwinds_slowly(0)
