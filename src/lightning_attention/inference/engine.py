"""Many requests at once: continuous batching over a pool of states that never grow."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Lock, RLock

import torch

from ..models import LightningForCausalLM
from ..nn import Slots
from ..ops.problem import state_dtype
from .decoder import Decoder
from .outputs import Completion, FinishReason, Output
from .pool import StatePool
from .prefixes import History, NewTokens, PrefixCache
from .sampling import NOT_FINITE, Sampler, SamplingOptions, choose_each, warn_of_ignored_options
from .sampling import stop_token_ids as default_stop_token_ids

log = logging.getLogger(__name__)


IsFinished = Callable[[Sequence[int]], bool]
OnError = Callable[[BaseException], None]


@dataclass(eq=False)
class _Request:
    history: History  # prompt and new tokens
    prompt_length: int
    options: SamplingOptions
    sampler: Sampler
    stop_token_ids: frozenset[int]
    is_finished: IsFinished | None
    on_error: OnError | None
    new_tokens: NewTokens = field(init=False)
    id: int = -1
    slot: int = -1
    num_read: int = 0  # tokens whose state is in the slot
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.new_tokens = NewTokens(self.history, self.prompt_length)

    @property
    def is_writing(self) -> bool:
        return self.num_read >= self.prompt_length


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

    One thread steps; any thread submits and cancels. An exception ends the requests whose states it may have spoiled
    as failed and is logged; all others go on. One that is not an `Exception`, such as KeyboardInterrupt, is raised
    again after that, and what the step has done until then is returned by the next.

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
        warn_of_ignored_options(model)
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
        self._waiting: OrderedDict[int, _Request] = OrderedDict()
        self._running: dict[int, _Request] = {}  # those with a slot
        self._cancelled: list[_Request] = []  # until the next step
        self._outputs: list[Output] = []  # that no step has returned yet
        self._lock = RLock()  # of all the above; never held while a model runs
        self._is_stepping = Lock()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._outputs)

    def submit(
        self,
        prompt: Sequence[int],
        options: SamplingOptions | None = None,
        *,
        stop_token_ids: Iterable[int] | None = None,
        is_finished: IsFinished | None = None,
        on_error: OnError | None = None,
    ) -> int:
        """Take a request; it starts with the next step.

        Args:
            prompt: token ids, at least one.
            options: how its tokens are chosen, and how many.
            stop_token_ids: end it; by default the `eos_token_id` of the model's generation_config, or else of its
                configuration.
            is_finished: called with all new tokens after each; true ends the request. The sequence is a view, which
                does not copy them.
            on_error: called with the exception if the request ends as failed.

        Returns:
            The number by which outputs name the request.

        Raises:
            ValueError: a token is not in the vocabulary, or there is none. Nothing else is touched.
        """
        return self._enqueue(self._request(prompt, options, stop_token_ids, is_finished, on_error))

    def cancel(self, request: int) -> bool:
        """End a request; the next step says so. False if it had ended, or never was."""
        with self._lock:
            found = self._waiting.get(request) or self._running.get(request)
            if found is None or found.is_cancelled:
                return False
            found.is_cancelled = True
            self._cancelled.append(found)
            return True

    def step(self) -> list[Output]:
        """A token for every request that is writing, and some of the prompts of those that are not yet.

        Raises:
            RuntimeError: another step is running, in another thread or around an `is_finished` that calls this.
        """
        with self._alone():
            return self._step()

    def run(self, prompts: Sequence[Sequence[int]], options: SamplingOptions | None = None) -> list[Completion]:
        """Answers to prompts that share their options, all at once.

        Requests that were there before go on meanwhile, and the next step returns their outputs. After an exception
        those of this call are gone.

        Raises:
            ValueError: as `submit`, before anything is done.
            RuntimeError: as `step`.
        """
        requests = [self._request(prompt, options) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in requests]
        reasons: dict[int, FinishReason] = {}
        others: list[Output] = []
        with self._alone():
            numbers = {self._enqueue(request): i for i, request in enumerate(requests)}
            try:
                while len(reasons) < len(requests):
                    for output in self._step():
                        if (i := numbers.get(output.request)) is None:
                            others.append(output)
                            continue
                        if output.token is not None:
                            tokens[i].append(output.token)
                        if output.finish_reason is not None:
                            reasons[i] = output.finish_reason
            finally:
                for request in requests:
                    self._end(request, FinishReason.CANCELLED)
                with self._lock:
                    self._outputs = others + [output for output in self._outputs if output.request not in numbers]
        return [Completion(tokens[i], reasons[i]) for i in range(len(requests))]

    def _request(
        self,
        prompt: Sequence[int],
        options: SamplingOptions | None,
        stop_token_ids: Iterable[int] | None = None,
        is_finished: IsFinished | None = None,
        on_error: OnError | None = None,
    ) -> _Request:
        options = options or SamplingOptions()
        tokens, vocab_size = list(prompt), self.model.config.vocab_size
        if not tokens:
            raise ValueError("prompt must hold at least one token")
        if not all(isinstance(token, int) for token in tokens):
            raise ValueError("prompt must be token ids")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(f"prompt must be token ids in [0, {vocab_size}), got {min(tokens)} to {max(tokens)}")
        stop = default_stop_token_ids(self.model) if stop_token_ids is None else frozenset(stop_token_ids)
        sampler = Sampler(options, tokens, vocab_size, self.model.device)
        history = History(self.prefix_block, tokens)
        return _Request(history, len(tokens), options, sampler, stop, is_finished, on_error)

    def _enqueue(self, request: _Request) -> int:
        with self._lock:
            request.id, self._next_id = self._next_id, self._next_id + 1
            self._waiting[request.id] = request
        return request.id

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._is_stepping.acquire(blocking=False):
            raise RuntimeError("a step of this engine is running already: let one thread do all of them")
        try:
            yield
        finally:
            self._is_stepping.release()

    def _step(self) -> list[Output]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            self._end(request, FinishReason.CANCELLED)
        self._write()
        self._admit()
        self._read()
        with self._lock:
            outputs, self._outputs = self._outputs, []
        return outputs

    @contextmanager
    def _changing(self, requests: Iterable[_Request]) -> Iterator[list[_Request]]:
        """Change the states of requests. An exception ends as failed those that are still in the list.

        Half of a step may be in their states by then, so that they cannot go on. Slots that nobody has are freed.
        """
        in_flight = list(requests)
        try:
            yield in_flight
        except BaseException as error:
            for request in in_flight:
                self._end(request, FinishReason.FAILED)
            used = {request.slot for request in self._running.values()}
            self.pool.free_all_but(used.union(self.prefixes.slots))
            for request in in_flight:
                _report(request, error)
            if not isinstance(error, Exception):
                raise

    def _write(self) -> None:
        writing = [request for request in self._running.values() if request.is_writing]
        if not writing:
            return
        with self._changing(writing) as in_flight:
            logits = self._decoder(
                [request.history.tokens[-1] for request in writing],
                [request.num_read for request in writing],
                [request.slot for request in writing],
            )
            for request in writing:
                request.num_read += 1
            self._choose(logits, writing, in_flight)

    def _admit(self) -> None:
        """Give slots to those who wait, with the state of the longest beginning that is known."""
        while len(self._running) < self.max_requests:
            with self._lock:
                request = next(iter(self._waiting.values()), None)
            if request is None:
                return
            with self._changing([request]) as in_flight:
                request.slot = self.pool.allocate()
                if found := self.prefixes.find(request.history):
                    self.pool.copy(found.slot, request.slot)
                    request.num_read = found.length
                else:
                    self.pool.zero([request.slot])
                with self._lock:
                    self._running[request.id] = self._waiting.pop(request.id)
                in_flight.clear()

    def _read(self) -> None:
        reading = [request for request in self._running.values() if not request.is_writing]
        pieces, left, room = [], self.prefill_tokens, self.prefixes.capacity
        for request in reading:
            stop = min(request.prompt_length, request.num_read + left)
            saved_at = self._whole_blocks(request, stop)[-room:] if room else []
            pieces.append(_Piece(request, stop, saved_at))
            left, room = left - (stop - request.num_read), room - len(saved_at)
            if left == 0:
                break
        if not pieces:
            return
        with self._changing(piece.request for piece in pieces) as in_flight:
            saved = self._slots_for_prefixes(sum(len(piece.saved_at) for piece in pieces))
            hidden_states = self._prefill(pieces, saved)
            for piece in pieces:
                piece.request.num_read = piece.stop
                for length in piece.saved_at:
                    self._free(self.prefixes.put(piece.request.history, length, saved.pop(0)))
            done = [row for row, piece in enumerate(pieces) if piece.request.is_writing]
            in_flight[:] = readers = [pieces[row].request for row in done]
            if readers:
                with torch.no_grad():
                    logits = self.model.lm_head(hidden_states[torch.tensor(done, device=hidden_states.device)])
                self._choose(logits, readers, in_flight)

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

    def _choose(self, logits: torch.Tensor, requests: list[_Request], in_flight: list[_Request]) -> None:
        """The next token of each, and its end if it is; an exception of one request's own ends that request alone."""
        tokens = choose_each(logits, [request.sampler for request in requests])
        for token, request in zip(tokens, requests, strict=True):
            request.history.extend([] if token is None else [token])
        interruption: BaseException | None = None
        for token, request in zip(tokens, requests, strict=True):
            failure: BaseException | None = None
            try:
                reason = self._finish_reason(request, token)
            except BaseException as error:
                reason, failure = FinishReason.FAILED, error
            if reason is not None:
                self._end(request, reason, token)
            else:
                with self._lock:
                    self._outputs.append(Output(request.id, token, None))
            in_flight.remove(request)
            if failure is not None:
                _report(request, failure)
                if not isinstance(failure, Exception):
                    interruption = interruption or failure
        if interruption is not None:
            raise interruption

    def _finish_reason(self, request: _Request, token: int | None) -> FinishReason | None:
        if token is None:
            raise ValueError(NOT_FINITE)
        if request.is_cancelled:
            return FinishReason.CANCELLED
        if token in request.stop_token_ids:
            return FinishReason.STOP
        if request.is_finished is not None and request.is_finished(request.new_tokens):
            return FinishReason.STOP
        if request.is_cancelled:  # by its own `is_finished`
            return FinishReason.CANCELLED
        return FinishReason.LENGTH if len(request.new_tokens) >= request.options.max_new_tokens else None

    def _end(self, request: _Request, reason: FinishReason, token: int | None = None) -> None:
        """End a request if it has not ended yet. A state that may begin another prompt goes to the prefix cache."""
        with self._lock:
            if request.id not in self._waiting and request.id not in self._running:
                return
            if request.is_cancelled and reason is not FinishReason.FAILED:
                reason = FinishReason.CANCELLED
            self._outputs.append(Output(request.id, token, reason))
            self._waiting.pop(request.id, None)
            self._running.pop(request.id, None)
        if request.slot >= 0:
            is_kept = reason in (FinishReason.STOP, FinishReason.LENGTH)
            self._free(
                self.prefixes.put(request.history, request.num_read, request.slot) if is_kept else [request.slot]
            )

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self.pool.free(slot)

    def _tensor(self, values: Sequence) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)


def _report(request: _Request, error: BaseException) -> None:
    log.error("request %d failed", request.id, exc_info=error)
    if request.on_error is not None:
        try:
            request.on_error(error)
        except Exception:
            log.exception("on_error of request %d", request.id)
