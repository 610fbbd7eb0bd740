"""Agreement of the ranks before a call: an error on one rank, or a difference between ranks, raises on every rank.

Each rank sends one header of fixed size: whether it failed, how many tokens it holds, and a digest of every term that
must be equal. The ranks exchange texts only after a failure.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEADER_SIZE = 32  # integers
TEXT_SIZE = 1024  # bytes
SHOWN_CHARACTERS = 80  # of a value that differs between ranks

# Types that the other ranks raise too, so that one `except` works on every rank; RuntimeError stands for all others.
ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError)}


class Agreement:
    """Context in which a rank checks its own arguments, and then compares them with the other ranks.

        with Agreement(group, q) as agreement:
            ...  # an error here raises from `compare` on the other ranks
            lengths = agreement.compare(q.shape[1], {"V": v.shape[-1]})

    Args:
        group: process group; None is the default group.
        tensor: any tensor on the device of this rank; another object is ignored.
        enabled: False never tells the other ranks about an error.
    """

    def __init__(self, group: "dist.ProcessGroup | None", tensor: object, *, enabled: bool = True):
        self.group, self.tensor, self.is_pending = group, tensor, enabled

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self.is_pending and is_member(self.group):
            self._send_error(error)

    def compare(self, length: int, terms: Mapping[str, object]) -> list[int]:
        """Compare the terms of all ranks.

        Args:
            length: number of tokens on this rank.
            terms: values that must be equal on every rank, by their names in errors; the same names on every rank.

        Returns:
            Lengths of all ranks.

        Raises:
            ValueError: a term differs between ranks.
            ValueError, TypeError, NotImplementedError, RuntimeError: another rank raised an error before it compared.
        """
        self.is_pending = False  # from here on an error is not sent: each rank sends one header
        if dist.get_world_size(self.group) == 1:
            return [length]
        device = self._device()
        headers = self._gather(_header([0, length, *map(_digest, terms.values())]), device)
        failed, lengths, *digests = zip(*headers, strict=True)
        if any(failed):
            raise _remote_error(self._gather_texts("", device))
        for (name, value), column in zip(terms.items(), digests, strict=False):  # digests are padded
            if len(set(column)) > 1:
                raise _difference(name, column, self._gather_texts(repr(value), device))
        return list(lengths)

    def _send_error(self, error: BaseException) -> None:
        """Join the collectives of the other ranks, so that they raise too."""
        self.is_pending = False
        try:
            if dist.get_world_size(self.group) > 1:
                device, text = self._device(), f"{type(error).__name__}: {error}".removesuffix(": ")
                _in_a_thread(lambda: (self._gather(_header([1]), device), self._gather_texts(text, device)))
        except Exception as failure:
            error.add_note(f"The other ranks of the group could not be told: {failure}")

    def _device(self) -> torch.device:
        """Device for headers, one that the group's backend serves: the CPU if possible."""
        types = device_types(self.group)
        if "cpu" in types:
            return torch.device("cpu")
        for device in (self._group.bound_device_id, self.tensor.device if isinstance(self.tensor, Tensor) else None):
            if device is not None and device.type in types:
                return device
        return torch.empty(0, device=types[0]).device

    @property
    def _group(self) -> Any:
        return dist.group.WORLD if self.group is None else self.group

    def _gather(self, values: list[int], device: torch.device) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        gathered = mine.new_empty(dist.get_world_size(self.group), len(values))
        self._group.allgather([list(gathered)], [mine]).wait()
        return gathered.tolist()

    def _gather_texts(self, text: str, device: torch.device) -> list[str]:
        encoded = text.encode(errors="replace")[:TEXT_SIZE].ljust(TEXT_SIZE, b"\0")
        return [bytes(sent).rstrip(b"\0").decode(errors="ignore") for sent in self._gather(list(encoded), device)]


def is_member(group: "dist.ProcessGroup | None") -> bool:
    """True if this process has a rank in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return (group is None or isinstance(group, dist.ProcessGroup)) and dist.get_rank(group) >= 0


def device_types(group: "dist.ProcessGroup | None") -> list[str]:
    """Types of devices that the group's backends serve, such as "cpu" and "cuda"."""
    return [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _header(values: list[int]) -> list[int]:
    assert len(values) <= HEADER_SIZE
    return values + [0] * (HEADER_SIZE - len(values))


def _digest(value: object) -> int:
    """64-bit hash that is the same in every process."""
    return int.from_bytes(sha256(repr(value).encode()).digest()[:8], "little", signed=True)


def _remote_error(texts: list[str]) -> Exception:
    raised = {rank: text for rank, text in enumerate(texts) if text}
    message = "; ".join(f"rank {rank} raised {text}" for rank, text in raised.items())
    name = next(iter(raised.values())).partition(":")[0]
    return ERRORS.get(name, RuntimeError)(message)


def _difference(name: str, digests: tuple[int, ...], texts: list[str]) -> ValueError:
    shown = (text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..." for text in texts)
    ranks = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    differ = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(ranks)} differ"
    return ValueError(
        f"{name} must be the same on every rank of the group, got [{', '.join(shown)}]: {differ} from rank 0"
    )


def _in_a_thread(function: Callable[[], object]) -> None:
    """Call the function where no transform of torch.func, dispatch mode or autocast of this thread is active."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(function).result()
