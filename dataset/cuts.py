"""Where the turns of a rendered conversation begin and end, and so what of its text is supervised.

A turn is what the model would have to write there: behind the prompt for it, and as it reads when it is the last one.
The traits of the template say what of the prompt belongs to the answer, and what closes it.
"""

from collections.abc import Sequence

from dataset.errors import RowError
from dataset.template import Prefix, Rendering
from dataset.traits import Traits

CLOSING = 64  # characters that a template may need to close a message


def cut(rendering: Rendering, traits: Traits, trained: Sequence[int], cuts: Sequence[int]) -> list[tuple[str, bool]]:
    """Cuts the rendered messages at these assistant turns, and ends with the last of them.

    What a turn adds, from the header to the end of what closes it, is supervised, or what the template itself marks
    by `{% generation %}`. What lies between is every second stretch, beginning with the first.
    """
    whole, done = rendering.text, 0
    stretches: list[tuple[str, bool]] = []
    for turn in cuts:
        if rendering.marked and traits.marks:
            spans = [(start, end, "") for start, end in _marked(rendering, turn) if start >= done]
        else:
            start = _start_of(rendering, traits, turn)
            end, missing = _end_of(rendering, traits, turn, start)
            spans = [(start, end, missing)]
        for start, end, missing in spans:
            stretches += [(whole[done:start], False), (whole[start:end] + missing, turn in trained)]
            done = end
    return stretches


def _marked(rendering: Rendering, turn: int) -> list[tuple[int, int]]:
    """What the template marks of a turn: spans that are not yet there in the messages before it."""
    before, through = rendering.prefix(turn), rendering.through(turn)
    if not through.is_in_whole(len(through)):
        raise _unstable(through, turn + 1)
    spans: list[tuple[int, int]] = []
    for start, end in rendering.marked:
        if not (before.shared < end <= len(through) and start < end):
            continue
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    if not spans:
        raise RowError("NO_SUPERVISED", f"the chat template marks nothing of message {turn} as the assistant's")
    return spans


def _start_of(rendering: Rendering, traits: Traits, turn: int) -> int:
    """Where the answer begins: after the prompt for it, without what that already holds of an answer."""
    prompt = rendering.prefix(turn, generation_prompt=True)
    for opening in (*filter(None, [traits.thinking]), "", *traits.openings):
        start = len(prompt) - len(opening)
        if prompt.part(start, len(prompt)) == opening and prompt.is_in_whole(start):
            if not rendering.text.startswith(opening, start):
                rendering.notes.append(
                    f"the prompt for an answer ends with {opening!r}, and some answers do not begin so"
                )
            unasked = bool(traits.header) and rendering.text.startswith(traits.header, start)
            return start + len(traits.header) if unasked else start
    start = _behind_header(rendering, traits.header, turn, prompt)
    if start is not None:
        rendering.notes.append("the chat template asks for answers in other words than conversations show")
        return start
    place = f"the prompt for message {turn}, and the message with what comes before it,"
    raise _parted(f"{place} are rendered differently", prompt, "in the prompt", "before the message")


def _end_of(rendering: Rendering, traits: Traits, turn: int, start: int) -> tuple[int, str]:
    """Where the turn ends, and what closes it besides where the template leaves the last turn open.

    Rendered as the last one, a turn must read as it does with the others after it, or it is another text that the
    model would have to write.
    """
    ending, through = traits.ending(rendering.messages[turn]), rendering.through(turn)
    last = turn == len(rendering.messages) - 1
    if ending is not None:
        end = len(through) - len(ending.rest)
        closed = through.part(end - len(ending.token), end) + ending.missing
        if end >= start and through.part(end, len(through)) == ending.rest and closed.endswith(ending.token):
            missing = ending.missing if last else _follows(rendering.text, end, ending.missing, traits)
            if not through.is_in_whole(end) or missing is None:
                raise _unstable(through, turn + 1)
            return (end, missing) if last else (end + len(missing), "")
    found = through.part(len(through) - 40, len(through))
    wanted = f"with {ending.token!r}, as other turns do" if ending else "in a way that shows its end"
    raise RowError(
        "NO_END_OF_TURN",
        f"the template does not end message {turn} {wanted}: {found!r}; --chat_template names another template",
    )


def _follows(text: str, end: int, missing: str, traits: Traits) -> str | None:
    """What closes a turn amid others where the template leaves the last one open: the usual end, or another header."""
    others = sorted(traits.structural, key=len, reverse=True) if missing in traits.structural else ()
    return next((mark for mark in (missing, *others) if text.startswith(mark, end)), None)


def _behind_header(rendering: Rendering, header: str, turn: int, prompt: Prefix) -> int | None:
    """Where the header of an answer ends that stands soon after the place up to which the prompt reads alike.

    A template may close what was said before, or ask for the answer, in other words where it writes the prompt.
    """
    said = rendering.messages[turn - 1]["content"].strip()
    if not header or said not in rendering.text[: prompt.shared]:
        return None
    nearest = max(0, prompt.shared - len(header) + 1)
    at = rendering.text.find(header, nearest, nearest + 2 * len(header) + CLOSING)
    return None if at < 0 else at + len(header)


def _unstable(prefix: Prefix, count: int) -> RowError:
    said = f"the chat template renders the first {count} messages differently when more follow"
    return _parted(said, prefix, "alone", "with the rest")


def _parted(said: str, prefix: Prefix, here: str, there: str) -> RowError:
    at = next((at for at in range(prefix.shared, len(prefix)) if not prefix.is_in_whole(at + 1)), prefix.shared)
    alone, whole = prefix.part(at, at + 40), prefix.whole[at : at + 40]
    return RowError(
        "UNSTABLE_TEMPLATE", f"{said}; the first difference is at character {at}: {alone!r} {here}, {whole!r} {there}"
    )
