"""The embedded instruction set: small exercises from our own templates, whose answers can be checked letter by letter.

Each family draws a problem and words it as a conversation. Whether a problem belongs to training or is held out depends on
the problem alone (a hash of its key), never on the seed or the wording: no training set of any seed holds a held-out problem
of another. Answers write their working out, since a model of a million parameters cannot add in its head.
Only `Random.random()` is used, whose sequence Python guarantees across versions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

Problem = tuple[str, list[str]]  # key of the underlying problem, turns (user first, then alternating)

WORDS = ["apple", "anchor", "autumn", "basket", "bakery", "balloon", "banana", "barrel", "beetle", "blanket", "border", "bottle", "bridge", "bubble", "butter", "button", "cabin", "camel", "candle", "canyon", "carpet", "castle", "cattle", "cellar", "cherry", "circle", "cliff", "coffee", "corner", "cotton", "cousin", "dinner", "doctor", "dollar", "donkey", "dragon", "drawer", "eagle", "engine", "evening", "fabric", "falcon", "family", "farmer", "feather", "fiddle", "finger", "flower", "forest", "fossil", "fountain", "garden", "garlic", "ginger", "glacier", "goblet", "grammar", "guitar", "hammer", "harbour", "harvest", "helmet", "hollow", "honey", "hunter", "island", "ivory", "jacket", "jungle", "kettle", "kitchen", "kitten", "ladder", "lantern", "lemon", "lentil", "letter", "lizard", "magnet", "mango", "market", "meadow", "melon", "mirror", "mitten", "monkey", "muffin", "needle", "nephew", "noodle", "oasis", "ocean", "office", "olive", "onion", "orange", "otter", "oven", "oyster", "paddle", "paper", "parrot", "pebble", "pencil", "pepper", "pillow", "pirate", "planet", "pocket", "potato", "puddle", "puppet", "quarry", "quilt", "rabbit", "raisin", "ribbon", "river", "robin", "rocket", "saddle", "sailor", "salad", "school", "season", "shadow", "silver", "spider", "spoon", "squirrel", "stone", "summer", "sunset", "table", "teapot", "temple", "thunder", "ticket", "timber", "tomato", "tunnel", "turtle", "umbrella", "uncle", "valley", "velvet", "violin", "wagon", "walnut", "water", "weather", "whistle", "window", "winter", "wizard", "yellow", "yogurt", "zebra", "zipper"]
THINGS = ["tea", "chess", "music", "football", "painting", "swimming", "bread", "snow", "maths", "dancing", "trains", "poetry", "soup", "cats", "horses", "robots"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
UNITS = [  # (one, several, how many of the smaller, the smaller)
    ("hour", "hours", 60, "minutes"),
    ("minute", "minutes", 60, "seconds"),
    ("degree", "degrees", 60, "arc minutes"),
    ("year", "years", 12, "months"),
    ("foot", "feet", 12, "inches"),
    ("dozen", "dozen", 12, "pieces"),
    ("week", "weeks", 7, "days"),
    ("decade", "decades", 10, "years"),
    ("centimetre", "centimetres", 10, "millimetres"),
    ("metre", "metres", 100, "centimetres"),
    ("century", "centuries", 100, "years"),
    ("dollar", "dollars", 100, "cents"),
    ("kilometre", "kilometres", 1000, "metres"),
    ("kilogram", "kilograms", 1000, "grams"),
    ("litre", "litres", 1000, "millilitres"),
    ("yard", "yards", 3, "feet"),
    ("gallon", "gallons", 4, "quarts"),
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


def invented_word(rng: Random) -> str:
    syllables = (pick(rng, "bdfgklmnprstvz") + pick(rng, "aeiou") for _ in range(integer(rng, 2, 3)))
    return "".join(syllables) + pick(rng, ["", "", "n", "r", "s", "l"])


def spelling_word(rng: Random) -> str:
    return pick(rng, WORDS) if rng.random() < 0.5 else invented_word(rng)


def sum_in_steps(a: int, b: int) -> str:
    """Column addition of two numbers below 100, aloud."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return (
        f"Ones: {a % 10} + {b % 10} = {ones}, carry {carry}. "
        f"Tens: {a // 10} + {b // 10} + {carry} = {tens}. So {a} + {b} = {a + b}."
    )


def addition(rng: Random) -> Problem:
    a, b = integer(rng, 10, 99), integer(rng, 10, 99)
    question = pick(rng, ["What is {} + {}?", "Add {} and {}.", "Work out {} + {}.", "How much is {} plus {}?"])
    return f"sum {min(a, b)} {max(a, b)}", [question.format(a, b), sum_in_steps(a, b)]


def draw_numbers(rng: Random) -> tuple[str, list[int]]:
    numbers = several(rng, integer(rng, 3, 5), lambda: integer(rng, 1, 99))
    return "numbers " + " ".join(map(str, sorted(numbers))), numbers


def listing(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))


def ordering(rng: Random) -> Problem:
    key, numbers = draw_numbers(rng)
    up = sorted(numbers)
    question, answer = pick(
        rng,
        [
            ("Sort these numbers from smallest to largest: {}.", listing(up)),
            ("Put {} in ascending order.", listing(up)),
            ("Sort these numbers from largest to smallest: {}.", listing(up[::-1])),
            ("Which of these numbers is the largest: {}?", f"The largest is {up[-1]}."),
            ("Which of these numbers is the smallest: {}?", f"The smallest is {up[0]}."),
        ],
    )
    return key, [question.format(listing(numbers)), answer]


def draw_words(rng: Random) -> tuple[str, list[str]]:
    """Words whose first letters differ, so that the order needs one letter only."""
    words = several(rng, integer(rng, 3, 4), lambda: pick(rng, WORDS))
    while len({word[0] for word in words}) < len(words):
        words = several(rng, len(words), lambda: pick(rng, WORDS))
    return "words " + " ".join(sorted(words)), words


def alphabetical(rng: Random) -> Problem:
    key, words = draw_words(rng)
    question = pick(
        rng, ["Sort these words alphabetically: {}.", "Put {} in alphabetical order.", "Arrange from A to Z: {}."]
    )
    return key, [question.format(listing(words)), listing(sorted(words))]


def backwards(rng: Random) -> Problem:
    word = spelling_word(rng)
    question = pick(
        rng, ['Spell "{}" backwards.', 'Write the word "{}" in reverse.', 'What is "{}" spelt from back to front?']
    )
    answer = f"Forwards: {' '.join(word)}. Backwards: {' '.join(reversed(word))}."
    return f"word {word}", [question.format(word), answer]


def counting(rng: Random) -> Problem:
    word = spelling_word(rng)
    letter = pick(rng, word) if rng.random() < 0.85 else pick(rng, "aeinorst")
    question = pick(
        rng, ['How many times does {1} occur in "{0}"?', 'How many {1} are in "{0}"?', 'Count the letter {1} in "{0}".']
    )
    steps, count = [], 0
    for each in word:
        count += each == letter
        steps.append(f"{each} {count}" if each == letter else each)
    times = "once" if count == 1 else f"{count} times"
    return f"word {word}", [question.format(word, letter), f"{', '.join(steps)}. The letter {letter} occurs {times}."]


def units(rng: Random) -> Problem:
    one, many, factor, smaller = pick(rng, UNITS)
    n = integer(rng, 2, 20)
    question = pick(rng, ["How many {1} are {0}?", "Convert {0} to {1}.", "What is {0} in {1}?"])
    answer = f"1 {one} is {factor} {smaller}, so {n} {many} are {n} x {factor} = {n * factor} {smaller}."
    return f"units {n} {many}", [question.format(f"{n} {many}", smaller), answer]


def calendar(rng: Random) -> Problem:
    cycle, noun = pick(rng, [(DAYS, "day"), (MONTHS, "month")])
    start, distance = integer(rng, 0, len(cycle) - 1), integer(rng, 1, len(cycle))
    sign, relation = pick(rng, [(1, "after"), (-1, "before")])
    question = pick(rng, ["Which {0} comes {1} {2} {3}?", "What {0} is {1} {2} {3}?", "Tell me the {0} {1} {2} {3}."])
    span = f"{distance} {noun}" + "s" * (distance > 1)
    steps = [f"{step} {cycle[(start + sign * step) % len(cycle)]}" for step in range(1, distance + 1)]
    answer = f"{listing(steps)}. It is {cycle[(start + sign * distance) % len(cycle)]}."
    return f"calendar {span} {relation} {cycle[start]}", [question.format(noun, span, relation, cycle[start]), answer]


def follow_up(rng: Random) -> Problem:
    """The second question can only be answered from the first answer."""
    if rng.random() < 0.5:
        key, items = draw_numbers(rng)
        first = "Sort these numbers from smallest to largest: {}."
    else:
        key, items = draw_words(rng)
        first = "Sort these words alphabetically: {}."
    ordered = sorted(items)
    second, answer = pick(
        rng,
        [
            ("Now the other way round, please.", listing(ordered[::-1])),
            ("And in reverse?", listing(ordered[::-1])),
            ("Which one comes first?", f"The first is {ordered[0]}."),
            ("Which one comes last?", f"The last is {ordered[-1]}."),
            ("Which one comes second?", f"The second is {ordered[1]}."),
        ],
    )
    return key, [first.format(listing(items)), listing(ordered), second, answer]


def memory(rng: Random) -> Problem:
    name, thing = invented_word(rng).capitalize(), pick(rng, THINGS)
    hello = pick(rng, ["My name is {} and I like {}.", "Hello, I am {}. I like {}.", "Hi! {} here, a friend of {}."])
    question, answer = pick(
        rng,
        [
            ("What is my name?", f"Your name is {name}."),
            ("Who am I?", f"Your name is {name}."),
            ("What do I like?", f"You like {thing}."),
        ],
    )
    return f"name {name}", [hello.format(name, thing), f"Hello, {name}! Nice to meet you.", question, answer]


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
    number = integer(rng, 1, 999)
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
    "alphabetical": alphabetical,
    "backwards": backwards,
    "counting": counting,
    "units": units,
    "calendar": calendar,
    "follow_up": follow_up,
    "memory": memory,
    "chinese": chinese,
}
TRAINING_ROWS = dict.fromkeys(FAMILIES, 1000)
HELD_OUT_ROWS = 30  # of each family


def is_held_out(key: str) -> bool:
    """One problem in eight, by the problem's key alone."""
    return hashlib.sha256(key.encode()).digest()[0] < 32


def conversation(family: str, turns: list[str]) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "family": family,
        "messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)],
    }


def problems(family: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one family and one side of the split."""
    rng = Random(f"{seed}/{split}/{family}")
    while True:
        problem = FAMILIES[family](rng)
        if is_held_out(problem[0]) == (split == "held out"):
            yield problem


def training_conversations(seed: int = 42) -> list[dict[str, Any]]:
    """TRAINING_ROWS conversations, family after family; a small family repeats problems in other words."""
    rows = []
    for family, count in TRAINING_ROWS.items():
        source = problems(family, "training", seed)
        rows += [conversation(family, next(source)[1]) for _ in range(count)]
    return rows


def held_out_conversations(seed: int = 42) -> list[dict[str, Any]]:
    """HELD_OUT_ROWS conversations of each family, all different problems; the last turn is the expected answer."""
    rows = []
    for family in FAMILIES:
        chosen: dict[str, list[str]] = {}
        for key, turns in problems(family, "held out", seed):
            chosen.setdefault(key, turns)
            if len(chosen) == HELD_OUT_ROWS:
                break
        rows += [conversation(family, turns) for turns in chosen.values()]
    return rows


def write_demo(directory: str | Path, seed: int = 42) -> tuple[Path, Path]:
    """Writes train.jsonl and heldout.jsonl into `directory` (made if absent) and returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "heldout.jsonl"
    for path, rows in zip(paths, (training_conversations(seed), held_out_conversations(seed)), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths
