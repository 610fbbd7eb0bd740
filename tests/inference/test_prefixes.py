"""Prefix cache: longest cached prefix, eviction of the least recently used."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.inference.prefixes import Found, History, PrefixCache

TOKENS = st.lists(st.integers(0, 2), max_size=9).map(tuple)


@given(st.integers(0, 4), st.integers(1, 4), st.lists(st.tuples(st.booleans(), TOKENS), max_size=20))
def test_the_cache_equals_a_list_of_prefixes(capacity, block, calls):
    """The reference is a list in order of use, the most recently used at the end."""
    cache, prefixes, slots = PrefixCache(capacity), [], {}
    for slot, (is_put, tokens) in enumerate(calls):
        history = History(block, tokens)
        if not is_put:
            found = [known for known in prefixes if len(known) < len(tokens) and tokens[: len(known)] == known]
            longest = max(found, key=len, default=None)
            expected = None if longest is None else Found(len(longest), slots[longest])
            assert cache.find(history) == expected
            if longest is not None:
                prefixes.append(prefixes.pop(prefixes.index(longest)))
            continue
        freed = cache.put(history, len(tokens), slot)
        evicted = [slots.pop(tokens)] if tokens in slots else []
        prefixes = [known for known in prefixes if known != tokens] + [tokens]
        slots[tokens] = slot
        while len(prefixes) > capacity:
            evicted.append(slots.pop(prefixes.pop(0)))
        assert freed == evicted
        assert len(cache) == len(prefixes)


def test_keys_do_not_depend_on_how_a_history_grew():
    complete, grown = History(3, range(10)), History(3, range(2))
    grown.extend([2])
    grown.extend(range(3, 10))
    assert [grown.key(n) for n in range(11)] == [complete.key(n) for n in range(11)]
    assert len({complete.key(n) for n in range(11)}) == 11


def test_make_room_evicts_the_least_recently_used():
    cache = PrefixCache(3)
    for slot, tokens in enumerate([(1,), (2,), (3,)]):
        cache.put(History(4, tokens), 1, slot)
    assert cache.find(History(4, (1, 9))) == Found(1, 0)
    assert cache.make_room(2) == [1, 2]
    assert cache.make_room(2) == []
    assert cache.find(History(4, (1, 9))) == Found(1, 0)
