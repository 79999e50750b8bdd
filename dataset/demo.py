"""The embedded instruction set: small exercises from our own templates, whose answers can be checked letter by letter.

Each family draws a problem and words it as a conversation. Whether a problem belongs to training or is held out depends
on the problem alone (a hash of its key), never on the seed or the wording: no training set of any seed holds a held-out
problem of another. Answers write their working out, and what is asked about stands at the end of the question: a model
of a million parameters learns in minutes to look back over a fixed distance, but not to add in its head.
Only `Random.random()` is used, whose sequence Python guarantees across versions.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

Problem = tuple[str, list[str]]  # key of the underlying problem, turns (user first, then alternating)


def words(text: str) -> list[str]:
    return text.split()


WORDS = words("""
    apple bag bread cake cat dog doctor egg evening farm flower game garden home house ice jar juice key kitchen lemon
    letter lunch milk mirror music night office orange paper pizza quarter queue ribbon river school season table ticket
    train uncle unit video view water window yard year zebra zero
""")
NAMES = words("""
    Adam Alice Anna Ben Carol Daniel David Emma Frank George Grace Helen Henry Jack James Jane John Julia Kate Laura Leo
    Linda Lucy Maria Mark Martin Mary Max Nina Oscar Paul Peter Rosa Sam Sarah Susan Thomas Tom Victor William
""")
THINGS = words(
    "tea chess music football painting swimming bread snow maths dancing trains poetry soup cats horses robots"
)
UNITS = [  # (unit, how many of the smaller unit it holds, the smaller unit)
    ("decades", 10, "years"),
    ("centimetres", 10, "millimetres"),
    ("metres", 100, "centimetres"),
    ("centuries", 100, "years"),
    ("dollars", 100, "cents"),
    ("kilometres", 1000, "metres"),
    ("kilograms", 1000, "grams"),
    ("litres", 1000, "millilitres"),
    ("tonnes", 1000, "kilograms"),
]
CHINESE_DIGITS = "零一二三四五六七八九"


def pick(rng: Random, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def integer(rng: Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def several(rng: Random, count: int, draw: Callable[[], Any]) -> list[Any]:
    """`count` different values of draw(), in the order of drawing."""
    chosen: list[Any] = []
    while len(chosen) < count:
        value = draw()
        if value not in chosen:
            chosen.append(value)
    return chosen


def addition(rng: Random) -> Problem:
    """Two numbers below 100, column by column with the carry in front."""
    a, b = integer(rng, 10, 99), integer(rng, 10, 99)
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = carry + a // 10 + b // 10
    question = pick(rng, ["What is {}+{}?", "Work out {}+{}.", "How much is {}+{}?"])
    answer = f"{a % 10}+{b % 10}={ones}, {carry}+{a // 10}+{b // 10}={tens}, so {a + b}."
    return f"sum {min(a, b)} {max(a, b)}", [question.format(a, b), answer]


def ordering(rng: Random) -> Problem:
    """Two numbers with different tens digits."""
    a, b = (10 * tens + integer(rng, 0, 9) for tens in several(rng, 2, lambda: integer(rng, 1, 9)))
    question, word, chosen = pick(
        rng,
        [
            ("Which is larger: {} or {}?", "larger", max(a, b)),
            ("Which number is the larger one, {} or {}?", "larger", max(a, b)),
            ("Which is smaller: {} or {}?", "smaller", min(a, b)),
            ("Which number is the smaller one, {} or {}?", "smaller", min(a, b)),
        ],
    )
    answer = f"{chosen} is {word} than {a + b - chosen}."
    return f"pair {min(a, b)} {max(a, b)}", [question.format(a, b), answer]


def draw_letters(rng: Random) -> tuple[str, list[str]]:
    """The letters of a word in capitals; half of the words are invented."""
    if rng.random() < 0.5:
        word = pick(rng, [word for word in WORDS if 3 < len(word) < 7])
    else:
        word = "".join(pick(rng, "bdfgklmnprstvz") + pick(rng, "aeiou") for _ in range(2))
        word += pick(rng, ["", "", "l", "n", "r", "s"])
    return f"letters {word}", list(word.upper())


def backwards(rng: Random) -> Problem:
    key, letters = draw_letters(rng)
    question = pick(rng, ["Spell backwards: {}", "Write in reverse: {}", "Read from back to front: {}"])
    return key, [question.format(" ".join(letters)), " ".join(reversed(letters))]


def counting(rng: Random) -> Problem:
    """The letters one by one with their numbers."""
    key, letters = draw_letters(rng)
    question = pick(rng, ["How many letters are these: {}", "Count the letters: {}", "How long is this word: {}"])
    steps = " ".join(f"{letter}{number}" for number, letter in enumerate(letters, 1))
    return key, [question.format(" ".join(letters)), f"{steps}, so {len(letters)} letters."]


def units(rng: Random) -> Problem:
    many, factor, smaller = pick(rng, UNITS)
    n = integer(rng, 2, 99)
    question = pick(rng, ["How many {1} are {0}?", "Convert {0} to {1}."])
    return f"units {n} {many} {smaller}", [
        question.format(f"{n} {many}", smaller),
        f"{n}x{factor}={n * factor} {smaller}.",
    ]


def memory(rng: Random) -> Problem:
    name, thing = pick(rng, NAMES), pick(rng, THINGS)
    hello = pick(rng, ["My name is {} and I like {}.", "Hello, I am {}. I like {}."])
    question, answer = pick(
        rng,
        [
            ("What is my name?", f"Your name is {name}."),
            ("Who am I?", f"Your name is {name}."),
            ("What do I like?", f"You like {thing}."),
        ],
    )
    return f"memory {name} {thing}", [hello.format(name, thing), f"Hello, {name}! Nice to meet you.", question, answer]


def chinese_numeral(number: int) -> str:
    """A number from 1 to 999 in Chinese characters: a zero inside is read once, a leading ten has no one."""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    text = CHINESE_DIGITS[hundreds] + "百" if hundreds else ""
    if tens:
        text += ("" if tens == 1 and not hundreds else CHINESE_DIGITS[tens]) + "十"
    elif hundreds and ones:
        text += "零"
    return text + (CHINESE_DIGITS[ones] if ones else "")


def chinese(rng: Random) -> Problem:
    number = integer(rng, 10, 399)
    characters = chinese_numeral(number)
    question, answer = pick(
        rng,
        [
            (f"把数字 {number} 写成汉字。", f"{number} 写作{characters}。"),
            (f"{number} 用中文怎么写？", f"{number} 写作{characters}。"),
            (f"“{characters}”用数字怎么写？", f"{characters}是 {number}。"),
        ],
    )
    return f"numeral {number}", [question, answer]


FAMILIES: dict[str, Callable[[Random], Problem]] = {
    "addition": addition,
    "ordering": ordering,
    "backwards": backwards,
    "counting": counting,
    "units": units,
    "memory": memory,
    "chinese": chinese,
}
TRAINING_ROWS = {
    "addition": 4000,
    "ordering": 7500,
    "backwards": 6000,
    "counting": 4000,
    "units": 3000,
    "memory": 2000,
    "chinese": 5000,
}
HELD_OUT_ROWS = 30  # of each family
MAX_DRAWS = 100_000  # a family with too few problems is our error, not an endless loop


def is_held_out(key: str) -> bool:
    """About one problem in six, by the problem's key alone."""
    return hashlib.sha256(key.encode()).digest()[0] < 43


def conversation(family: str, turns: list[str]) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "family": family,
        "messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)],
    }


def problems(family: str, split: str, seed: int) -> Iterator[Problem]:
    """Problems of one family and one side of the split ("training" or "held out")."""
    rng = Random(f"{seed}/{split}/{family}")
    for _ in range(MAX_DRAWS):
        problem = FAMILIES[family](rng)
        if is_held_out(problem[0]) == (split == "held out"):
            yield problem


def training_conversations(seed: int = 42) -> list[dict[str, Any]]:
    """TRAINING_ROWS conversations, family after family; a small family repeats problems in other words."""
    return [
        conversation(family, turns)
        for family, count in TRAINING_ROWS.items()
        for _, turns in islice(problems(family, "training", seed), count)
    ]


def held_out_conversations(seed: int = 42) -> list[dict[str, Any]]:
    """HELD_OUT_ROWS conversations of each family, all different problems; the last turn is the expected answer."""
    rows = []
    for family in FAMILIES:
        chosen: dict[str, list[str]] = {}
        for key, turns in problems(family, "held out", seed):
            chosen.setdefault(key, turns)
            if len(chosen) == HELD_OUT_ROWS:
                break
        assert len(chosen) == HELD_OUT_ROWS, f"{family} has only {len(chosen)} held-out problems"
        rows += [conversation(family, turns) for turns in chosen.values()]
    return rows


def write_demo(directory: str | Path, seed: int = 42) -> tuple[Path, Path]:
    """Writes train.jsonl and heldout.jsonl into `directory` (made if absent) and returns their paths.

    Several processes may call it at once: a file appears whole, and one that is there with this content is left alone.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "heldout.jsonl"
    for path, rows in zip(paths, (training_conversations(seed), held_out_conversations(seed)), strict=True):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not path.exists() or path.read_bytes() != content:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_bytes(content)
            os.replace(temporary, path)
    return paths
