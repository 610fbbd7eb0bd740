from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.inference.prefixes import Found, History, PrefixCache

TEXT = st.lists(st.integers(0, 2), max_size=9).map(tuple)


@given(st.integers(0, 4), st.integers(1, 4), st.lists(st.tuples(st.booleans(), TEXT), max_size=20))
def test_it_is_a_table_of_texts_with_a_limit(capacity, block, calls):
    """Against a list of texts, the last used at its end."""
    cache, texts, slots = PrefixCache(capacity), [], {}
    for slot, (is_put, text) in enumerate(calls):
        history = History(block, text)
        if not is_put:
            beginnings = [known for known in texts if len(known) < len(text) and text[: len(known)] == known]
            longest = max(beginnings, key=len, default=None)
            expected = None if longest is None else Found(len(longest), slots[longest])
            assert cache.find(history) == expected
            if longest is not None:
                texts.append(texts.pop(texts.index(longest)))
            continue
        freed = cache.put(history, len(text), slot)
        no_longer = [slots.pop(text)] if text in slots else []
        texts = [known for known in texts if known != text] + [text]
        slots[text] = slot
        while len(texts) > capacity:
            no_longer.append(slots.pop(texts.pop(0)))
        assert freed == no_longer
        assert len(cache) == len(texts)


def test_a_history_grows():
    whole, grown = History(3, range(10)), History(3, range(2))
    grown.extend([2])
    grown.extend(range(3, 10))
    assert [grown.key(n) for n in range(11)] == [whole.key(n) for n in range(11)]
    assert len({whole.key(n) for n in range(11)}) == 11


def test_room_is_made_by_the_least_recently_used():
    cache = PrefixCache(3)
    for slot, text in enumerate([(1,), (2,), (3,)]):
        cache.put(History(4, text), 1, slot)
    assert cache.find(History(4, (1, 9))) == Found(1, 0)
    assert cache.make_room(2) == [1, 2]
    assert cache.make_room(2) == []
    assert cache.find(History(4, (1, 9))) == Found(1, 0)
