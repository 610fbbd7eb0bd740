"""Cache of states by prefix: sequences of tokens read before, which new prompts may start with."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, overload

Key = tuple[bytes, tuple[int, ...]]


class History:
    """Tokens of a sequence, with a digest of every prefix of full blocks, each computed from the one before.

    Args:
        block: tokens per block.
        tokens: first tokens.
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
        """Key of the first `length` tokens: the digest of their full blocks, and the tokens after those."""
        blocks = length // self.block
        return self._digests[blocks], tuple(self.tokens[blocks * self.block : length])


class NewTokens(Sequence[int]):
    """View of the new tokens of a request, which grows with every step; slices are lists."""

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
    """Cached state: `slot` holds the state after the first `length` tokens."""

    length: int
    slot: int


class PrefixCache:
    """Map from prefixes to slots of a state pool; the least recently used prefix is evicted first.

    Args:
        capacity: number of states, at most.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._remainders: dict[bytes, set[tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> list[int]:
        """Slots of all cached states."""
        return list(self._slots.values())

    def find(self, history: History) -> Found | None:
        """Find the longest cached prefix that leaves at least one token to read."""
        tokens, block = history.tokens, history.block
        for start in reversed(range(0, len(tokens), block)):
            digest, _ = history.key(start)
            fitting = [
                remainder
                for remainder in self._remainders.get(digest, ())
                if start + len(remainder) < len(tokens) and tuple(tokens[start : start + len(remainder)]) == remainder
            ]
            if fitting:
                key = digest, max(fitting, key=len)
                self._slots.move_to_end(key)
                return Found(start + len(key[1]), self._slots[key])
        return None

    def put(self, history: History, length: int, slot: int) -> list[int]:
        """Cache the state after the first `length` tokens; return the slots that are no longer needed."""
        if self.capacity == 0:
            return [slot]
        digest, remainder = key = history.key(length)
        replaced = [self._slots.pop(key)] if key in self._slots else []
        self._slots[key] = slot
        self._remainders.setdefault(digest, set()).add(remainder)
        return replaced + self.make_room(0)

    def make_room(self, count: int) -> list[int]:
        """Evict until `count` more states fit; return the slots that are no longer needed."""
        return [self._evict() for _ in range(min(len(self), len(self) + count - self.capacity))]

    def _evict(self) -> int:
        (digest, remainder), slot = self._slots.popitem(last=False)
        self._remainders[digest].remove(remainder)
        if not self._remainders[digest]:
            del self._remainders[digest]
        return slot
