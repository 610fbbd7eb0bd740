"""States of texts read before, to be found by the beginning of a new one."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, overload

Key = tuple[bytes, tuple[int, ...]]


class History:
    """The tokens of a sequence, and a digest of every beginning of whole blocks, each chained to the one before.

    Args:
        block: tokens of a block.
        tokens: the first ones.
    """

    def __init__(self, block: int, tokens: Iterable[int]):
        self.block, self.tokens, self._digests = block, [], [b""]
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        self.tokens.extend(tokens)
        while len(self._digests) * self.block <= len(self.tokens):
            start = (len(self._digests) - 1) * self.block
            block = array("q", self.tokens[start : start + self.block]).tobytes()
            self._digests.append(blake2b(self._digests[-1] + block, digest_size=16).digest())

    def key(self, length: int) -> Key:
        """Of the first `length` tokens: the digest of their whole blocks, and the rest of them."""
        blocks = length // self.block
        return self._digests[blocks], tuple(self.tokens[blocks * self.block : length])


class NewTokens(Sequence[int]):
    """The new tokens of a request, without a copy: a view that grows with every step. Slices are lists."""

    def __init__(self, history: History, start: int):
        self._tokens, self._start = history.tokens, start

    def __len__(self) -> int:
        return len(self._tokens) - self._start

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        chosen = range(self._start, len(self._tokens))[index]
        return [self._tokens[i] for i in chosen] if isinstance(chosen, range) else self._tokens[chosen]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, NewTokens)) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


class Found(NamedTuple):
    """The state after the first `length` tokens is in `slot`."""

    length: int
    slot: int


class PrefixCache:
    """Which slot of a pool holds the state after which tokens. The least recently used is the first to go.

    Args:
        capacity: states, at most.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._rests: dict[bytes, set[tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> list[int]:
        """All slots that hold a state of the cache."""
        return list(self._slots.values())

    def find(self, history: History) -> Found | None:
        """The longest beginning whose state is here and that leaves at least one token to read."""
        tokens, block = history.tokens, history.block
        for start in reversed(range(0, len(tokens), block)):
            digest, _ = history.key(start)
            fitting = [
                rest
                for rest in self._rests.get(digest, ())
                if start + len(rest) < len(tokens) and tuple(tokens[start : start + len(rest)]) == rest
            ]
            if fitting:
                key = digest, max(fitting, key=len)
                self._slots.move_to_end(key)
                return Found(start + len(key[1]), self._slots[key])
        return None

    def put(self, history: History, length: int, slot: int) -> list[int]:
        """Keep the state after the first `length` tokens. Returns the slots that are no longer needed."""
        if self.capacity == 0:
            return [slot]
        digest, rest = key = history.key(length)
        replaced = [self._slots.pop(key)] if key in self._slots else []
        self._slots[key] = slot
        self._rests.setdefault(digest, set()).add(rest)
        return replaced + self.make_room(0)

    def make_room(self, count: int) -> list[int]:
        """Forget until `count` more states may be put. Returns the slots that are no longer needed."""
        return [self._evict() for _ in range(min(len(self), len(self) + count - self.capacity))]

    def _evict(self) -> int:
        (digest, rest), slot = self._slots.popitem(last=False)
        self._rests[digest].remove(rest)
        if not self._rests[digest]:
            del self._rests[digest]
        return slot
