"""Stop strings: however the text is cut into pieces, exactly the text before the earliest stop string is shown."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from serving.stop import StopMatcher

text = st.text("ab", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3).map(tuple)


def cut_at_first(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(len(stop) for stop in hits)], True
    return text, False


@given(st.lists(text, max_size=8), stops)
@example(["aab"], ("aab", "ab", "b"))
@example(["a", "b", "a"], ("aba",))
def test_shows_the_text_before_the_first_stop(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in "".join(pieces):
        shown += matcher.push(piece)
        if matcher.found:
            break
    expected, found = cut_at_first("".join(pieces), stops)
    assert matcher.found is found
    assert shown + matcher.flush() == expected


@given(st.lists(text, max_size=8), stops)
def test_never_shows_what_may_become_a_stop(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    whole = "".join(pieces)
    starts = [start for stop in stops if (start := whole.find(stop)) >= 0]
    assert matcher.found is bool(starts)
    if starts:
        assert shown == whole[: min(starts)]
    else:
        held = whole[len(shown) :]
        assert whole.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
        assert shown + matcher.flush() == whole


def test_without_stops_everything_passes_at_once() -> None:
    assert StopMatcher(()).push("anything") == "anything"
