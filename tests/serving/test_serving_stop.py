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
@example(["ab"], ("b", "a"))
@example(["aab"], ("b", "aab"))
@example(["abcab"], ("abcd", "b"))
def test_shows_the_text_before_the_first_stop(pieces: list[str], stops: tuple[str, ...]) -> None:
    whole = "".join(pieces)
    expected, found = cut_at_first(whole, stops)
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert expected.startswith(shown)
    assert matcher.found is found
    if found:
        assert shown == expected
    else:  # what waits may still become a stop string, and there is no longer end that may
        waits = [size for size in range(1, len(whole) + 1) if any(stop.startswith(whole[-size:]) for stop in stops)]
        assert len(whole) - len(shown) == max(waits, default=0)
    assert shown + matcher.flush() == expected


@given(st.lists(text, max_size=8), stops)
def test_shows_the_stop_that_is_wanted(pieces: list[str], stops: tuple[str, ...]) -> None:
    whole = "".join(pieces)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    matcher = StopMatcher(stops, include=True)
    assert "".join(map(matcher.push, pieces)) + matcher.flush() == whole[: min(ends, default=len(whole))]


def test_without_stops_everything_passes_at_once() -> None:
    assert StopMatcher(()).push("anything") == "anything"
