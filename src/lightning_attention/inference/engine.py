"""Many requests at once: continuous batching over a pool of states that never grow."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

import torch

from ..models import LightningForCausalLM
from ..nn import Slots
from ..ops.problem import state_dtype
from .decoder import Decoder
from .pool import StatePool
from .prefixes import History, PrefixCache
from .sampling import Sampler, SamplingOptions, choose

log = logging.getLogger(__name__)


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, or `is_finished`
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    FAILED = "failed"  # `is_finished` raised; the exception is logged


class Output(NamedTuple):
    """What a step has done for a request: one token more, or its end, or both."""

    request: int
    token: int | None
    finish_reason: FinishReason | None


class Completion(NamedTuple):
    """What a request has become: its new tokens, a stop token included."""

    tokens: list[int]
    finish_reason: FinishReason


@dataclass
class _Request:
    id: int
    history: History  # prompt and new tokens
    prompt_length: int
    options: SamplingOptions
    sampler: Sampler
    stop_token_ids: frozenset[int]
    is_finished: Callable[[list[int]], bool] | None
    slot: int = -1
    num_read: int = 0  # tokens whose state is in the slot

    @property
    def new_tokens(self) -> list[int]:
        return self.history.tokens[self.prompt_length :]


@dataclass
class _Piece:
    """Tokens of a prompt that are read in one call."""

    request: _Request
    stop: int
    saved_at: list[int]  # how many tokens in, for the prefix cache

    @property
    def start(self) -> int:
        return self.request.num_read


class Engine:
    """Serves requests on a model: they join and leave between steps, and share every step's work.

    A step gives a token to every request whose prompt has been read, and then reads on in the prompts of the others,
    packed, at most `prefill_tokens` at a time: a prompt of any length is read in fixed memory. Greedy answers are those
    of transformers' `generate()`. The states after every `prefix_block` tokens of a prompt, and after a finished
    request, are kept while there is room, and a prompt that begins the same way goes on from there.

        engine = Engine(model)
        request = engine.submit(token_ids, SamplingOptions(max_new_tokens=100, temperature=0))
        while engine.has_work:
            for output in engine.step():
                ...

    Args:
        model: a `LightningForCausalLM`; it is put into eval mode.
        max_requests: sequences decoded at once; more wait for their turn.
        prefill_tokens: of prompts that a step reads, at most.
        prefix_slots: states kept of what was read; 0 keeps none.
        prefix_block: tokens between the states kept of a prompt.
        pool_dtype: of the states: float32 (the default; float64 for such a model), or bfloat16 for half the memory.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        model: LightningForCausalLM,
        *,
        max_requests: int = 64,
        prefill_tokens: int = 4096,
        prefix_slots: int = 0,
        prefix_block: int = 512,
        pool_dtype: torch.dtype | None = None,
    ):
        for name, value, least in (
            ("max_requests", max_requests, 1),
            ("prefill_tokens", prefill_tokens, 1),
            ("prefix_slots", prefix_slots, 0),
            ("prefix_block", prefix_block, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.model = model.eval()
        self.max_requests, self.prefill_tokens, self.prefix_block = max_requests, prefill_tokens, prefix_block
        self.pool = StatePool(
            model.config,
            max_requests + prefix_slots,
            device=model.device,
            dtype=pool_dtype or state_dtype(model.dtype),
        )
        self.prefixes = PrefixCache(prefix_slots)
        self._decoder = Decoder(model, self.pool, max_requests)
        self._next_id = 0
        self._waiting: deque[_Request] = deque()
        self._reading: list[_Request] = []
        self._writing: list[_Request] = []
        self._cancelled: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._writing or self._cancelled)

    def submit(
        self,
        prompt: Sequence[int],
        options: SamplingOptions | None = None,
        *,
        stop_token_ids: Iterable[int] | None = None,
        is_finished: Callable[[list[int]], bool] | None = None,
    ) -> int:
        """Take a request; it starts with the next step.

        Args:
            prompt: token ids, at least one.
            options: how its tokens are chosen, and how many.
            stop_token_ids: end it; by default the model's `eos_token_id`.
            is_finished: called with all new tokens after each; true ends the request.

        Returns:
            The number by which outputs name the request.

        Raises:
            ValueError: a token is not in the vocabulary, or there is none. Nothing else is touched.
        """
        options = options or SamplingOptions()
        tokens, vocab_size = list(prompt), self.model.config.vocab_size
        if not tokens:
            raise ValueError("prompt must hold at least one token")
        if not all(isinstance(token, int) for token in tokens):
            raise ValueError("prompt must be token ids")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(f"prompt must be token ids in [0, {vocab_size}), got {min(tokens)} to {max(tokens)}")
        if stop_token_ids is None:
            eos = self.model.config.eos_token_id
            stop_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        request = _Request(
            self._next_id,
            History(self.prefix_block, tokens),
            len(tokens),
            options,
            Sampler(options, tokens, vocab_size, self.model.device),
            frozenset(stop_token_ids),
            is_finished,
        )
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def cancel(self, request: int) -> bool:
        """End a request; the next step says so. False if it had ended, or never was."""
        for requests in (self._waiting, self._reading, self._writing):
            for found in requests:
                if found.id == request:
                    requests.remove(found)
                    if found.slot >= 0:
                        self.pool.free(found.slot)
                    self._cancelled.append(request)
                    return True
        return False

    def step(self) -> list[Output]:
        """A token for every request that is writing, and some of the prompts of those that are not yet."""
        outputs = [Output(request, None, FinishReason.CANCELLED) for request in self._cancelled]
        self._cancelled.clear()
        outputs += self._write()
        self._admit()
        return outputs + self._read()

    def run(self, prompts: Sequence[Sequence[int]], options: SamplingOptions | None = None) -> list[Completion]:
        """Answers to prompts that share their options, all at once; for an engine that has nothing else to do."""
        numbers = {self.submit(prompt, options): i for i, prompt in enumerate(prompts)}
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons: list[FinishReason] = [FinishReason.CANCELLED for _ in prompts]
        while self.has_work:
            for output in self.step():
                i = numbers[output.request]
                if output.token is not None:
                    tokens[i].append(output.token)
                if output.finish_reason is not None:
                    reasons[i] = output.finish_reason
        return [Completion(*pair) for pair in zip(tokens, reasons, strict=True)]

    def _write(self) -> list[Output]:
        if not self._writing:
            return []
        logits = self._decoder(
            [request.history.tokens[-1] for request in self._writing],
            [request.num_read for request in self._writing],
            [request.slot for request in self._writing],
        )
        for request in self._writing:
            request.num_read += 1
        writing, self._writing = self._writing, []
        return self._choose(logits, writing)

    def _admit(self) -> None:
        """Give slots to those who wait, with the state of the longest beginning that is known."""
        fresh = []
        while self._waiting and len(self._reading) + len(self._writing) < self.max_requests:
            request = self._waiting.popleft()
            request.slot = self.pool.allocate()
            if found := self.prefixes.find(request.history):
                self.pool.copy(found.slot, request.slot)
                request.num_read = found.length
            else:
                fresh.append(request.slot)
            self._reading.append(request)
        self.pool.zero(fresh)

    def _read(self) -> list[Output]:
        pieces, left, room = [], self.prefill_tokens, self.prefixes.capacity
        for request in self._reading:
            stop = min(request.prompt_length, request.num_read + left)
            saved_at = self._whole_blocks(request, stop)[-room:] if room else []
            pieces.append(_Piece(request, stop, saved_at))
            left, room = left - (stop - request.num_read), room - len(saved_at)
            if left == 0:
                break
        if not pieces:
            return []
        saved = self._slots_for_prefixes(sum(len(piece.saved_at) for piece in pieces))
        hidden_states = self._prefill(pieces, saved)
        done = [row for row, piece in enumerate(pieces) if piece.stop == piece.request.prompt_length]
        for piece in pieces:
            piece.request.num_read = piece.stop
            for length in piece.saved_at:
                self._free(self.prefixes.put(piece.request.history, length, saved.pop(0)))
        if not done:
            return []
        readers = [pieces[row].request for row in done]
        self._reading = self._reading[len(done) :]  # pieces are in order, and only the last may be unfinished
        with torch.no_grad():
            logits = self.model.lm_head(hidden_states[torch.tensor(done, device=hidden_states.device)])
        return self._choose(logits, readers)

    def _prefill(self, pieces: list[_Piece], saved: list[int]) -> torch.Tensor:
        """The hidden states after the pieces, `[N, W]`; states advance, and those asked for are saved."""
        lengths = [piece.stop - piece.start for piece in pieces]
        starts = [0, *accumulate(lengths)]
        tokens = [token for piece in pieces for token in piece.request.history.tokens[piece.start : piece.stop]]
        positions = [position for piece in pieces for position in range(piece.start, piece.stop)]
        saved_after = [
            start + length - piece.start
            for start, piece in zip(starts, pieces, strict=False)
            for length in piece.saved_at
        ]
        slots = Slots(
            self._tensor([piece.request.slot for piece in pieces]),
            self._tensor(saved) if saved else None,
            self._tensor(saved_after) if saved else None,
        )
        rows = self._tensor([tokens, positions])
        return self.model.model.advance(rows[:1], rows[1:], self.pool.states, slots, self._tensor(starts))

    def _whole_blocks(self, request: _Request, stop: int) -> list[int]:
        """Where they end in a piece."""
        block = self.prefix_block
        return list(range((request.num_read // block + 1) * block, stop + 1, block))

    def _slots_for_prefixes(self, count: int) -> list[int]:
        if count:
            self._free(self.prefixes.make_room(count))
        return [self.pool.allocate() for _ in range(count)]

    def _choose(self, logits: torch.Tensor, requests: list[_Request]) -> list[Output]:
        """The next token of each; those that go on are writing."""
        outputs = []
        tokens = choose(logits, [request.sampler for request in requests])
        for token, request in zip(tokens, requests, strict=True):
            request.history.extend([token])
            reason = self._finish_reason(request, token)
            if reason is None:
                self._writing.append(request)
            else:
                self._free(self.prefixes.put(request.history, request.num_read, request.slot))
            outputs.append(Output(request.id, token, reason))
        return outputs

    def _finish_reason(self, request: _Request, token: int) -> FinishReason | None:
        if token in request.stop_token_ids:
            return FinishReason.STOP
        if request.is_finished:
            try:
                if request.is_finished(request.new_tokens):
                    return FinishReason.STOP
            except Exception:
                log.exception("is_finished of request %d", request.id)
                return FinishReason.FAILED
        is_full = len(request.history.tokens) - request.prompt_length >= request.options.max_new_tokens
        return FinishReason.LENGTH if is_full else None

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self.pool.free(slot)

    def _tensor(self, values: Sequence) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)
