"""Continuous batching of requests over a pool of states of constant size."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock, RLock

import torch

from ..models import LightningForCausalLM
from ..nn import Slots
from .checks import (
    check_callback,
    check_model,
    check_packing,
    check_ring,
    pool_dtype_for,
    token_ids,
    whole_number,
)
from .decoder import Decoder
from .logprobs import logprobs_by_request
from .outputs import Completion, FinishReason, Output, TokenLogprobs
from .pool import StatePool
from .prefixes import History, PrefixCache
from .requests import IsFinished, OnError, PromptChunk, Request, prompt_chunks
from .sampling import Sampler, SamplingOptions, check_options, choose_each, warn_of_ignored_options
from .sampling import stop_token_ids as default_stop_token_ids
from .weights import Weights


class Engine:
    """Serve many requests on a model by continuous batching.

    A step generates a token for every request whose prompt has been read, and then reads the prompts of the others,
    packed, at most `prefill_tokens` tokens: a prompt of any length is read in constant memory. Greedy answers equal
    those of transformers' `generate()`. With `prefix_slots`, the states after every `prefix_block` tokens of a prompt,
    and after finished requests, are kept in a prefix cache, and a prompt with a cached prefix is read from there on.
    The cache is emptied when an optimizer or `load_state_dict` changes weights of the model in place.

    One thread steps; any thread submits and cancels. An exception ends the requests whose states it may have damaged
    as failed and is logged; the other requests go on. An exception other than `Exception`, such as KeyboardInterrupt,
    is raised again afterwards; the next step returns the outputs of the interrupted one.

    Args:
        model: a `LightningForCausalLM`, which is put into eval mode.
        max_requests: requests that run at the same time; more wait.
        prefill_tokens: tokens of prompts that a step reads, at most.
        prefix_slots: states in the prefix cache, at most.
        prefix_block: tokens of a prompt between cached states.
        pool_dtype: dtype of the states: float32 (default; float64 for a float64 model), or bfloat16 for half the
            memory.
        ring: decode from a `DecodingState`, whose state is written once in a chunk of tokens and not for every token.
            By default on GPUs, where that is faster for more than a few requests, and for a model with
            `config.invariant`, which needs it: its log-probabilities then are those of a forward pass, see
            docs/determinism.md.
        pack_weights: on a CPU, decode with copies of the weights of linear layers that are arranged for it, which take
            as much memory again. They are made anew when an optimizer or `load_state_dict` changes weights in place;
            other changes, to `.data` for example, are not noticed.

    Raises:
        TypeError: an argument has the wrong type, such as a PEFT model or a `pool_dtype` that operators do not take.
        ValueError: a size is out of range, the model shares sequences with other processes, or its weights cannot be
            packed.

    Example:
        >>> from lightning_attention.inference import Engine, SamplingOptions, load
        >>> model, tokenizer = load("run")
        >>> engine = Engine(model)
        >>> request = engine.submit(tokenizer("hi").input_ids, SamplingOptions(max_new_tokens=4, temperature=0))
        >>> tokens = []
        >>> while engine.has_work:
        ...     tokens += [output.token for output in engine.step() if output.request == request]
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
        ring: bool | None = None,
        pack_weights: bool = False,
    ):
        check_model(model)
        self.max_requests = whole_number("max_requests", max_requests, at_least=1)
        self.prefill_tokens = whole_number("prefill_tokens", prefill_tokens, at_least=1)
        prefix_slots = whole_number("prefix_slots", prefix_slots, at_least=0)
        self.prefix_block = whole_number("prefix_block", prefix_block, at_least=1)
        dtype = pool_dtype_for(model.dtype, pool_dtype)
        warn_of_ignored_options(model)
        self.model = model.eval()
        ring_dtype = model.dtype if check_ring(model, ring) else None
        num_slots = self.max_requests + prefix_slots
        self.pool = StatePool(model.config, num_slots, device=model.device, dtype=dtype, ring_dtype=ring_dtype)
        self.prefixes = PrefixCache(prefix_slots)
        self._weights = Weights(model)
        self._weights_version = self._weights.version
        self._decoder = Decoder(model, self.pool, self.max_requests, pack_weights=check_packing(model, pack_weights))
        self._next_id = 0
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._running: dict[int, Request] = {}  # requests with a slot
        self._cancelled: list[Request] = []  # since the last step
        self._outputs: list[Output] = []  # not yet returned by a step
        self._lock = RLock()  # guards the attributes above; not held while the model runs
        self._step_lock = Lock()

    @property
    def num_waiting(self) -> int:
        """Number of requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of requests with a slot."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """True if requests wait or run, or a step has outputs to return."""
        return bool(self._waiting or self._running or self._outputs)

    def submit(
        self,
        prompt: Sequence[int],
        options: SamplingOptions | None = None,
        *,
        stop_token_ids: Iterable[int] | None = None,
        is_finished: IsFinished | None = None,
        on_error: OnError | None = None,
        logprobs: int | None = None,
    ) -> int:
        """Submit a request; it starts with the next step.

        Args:
            prompt: token ids, at least one.
            options: how tokens are chosen, and how many.
            stop_token_ids: tokens that end the request; by default the `eos_token_id` of the model's generation_config,
                or else of its configuration.
            is_finished: called after each token with all new tokens, a view without a copy; true ends the request.
            on_error: called with the exception if the request fails.
            logprobs: outputs have the log-probability of the new token, and of this many most likely tokens; None for
                no log-probabilities.

        Returns:
            The number of the request in outputs.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the prompt is empty, a token is not in the vocabulary, or the prompt and the new tokens exceed
                the positions of the model, see `LightningConfig.max_position_embeddings`.
        """
        return self._enqueue(self._request(prompt, options, stop_token_ids, is_finished, on_error, logprobs))

    def cancel(self, request: int) -> bool:
        """Cancel a request; the next step returns its end. False if the request has ended or does not exist."""
        with self._lock:
            found = self._waiting.get(request) or self._running.get(request)
            if found is None or found.is_cancelled:
                return False
            found.is_cancelled = True
            self._cancelled.append(found)
            return True

    def step(self) -> list[Output]:
        """Generate a token for every request whose prompt has been read, and read on in the other prompts.

        Raises:
            RuntimeError: another step is running, in another thread or around a callback that calls this.
        """
        with self._stepping():
            return self._step()

    def run(self, prompts: Sequence[Sequence[int]], options: SamplingOptions | None = None) -> list[Completion]:
        """Answer all prompts with the same options.

        Requests submitted before go on meanwhile, and the next step returns their outputs. After an exception the
        requests of this call are cancelled.

        Raises:
            TypeError, ValueError: as `submit`, before any prompt is read.
            RuntimeError: as `step`.

        Example:
            >>> from lightning_attention.inference import Engine, SamplingOptions, load
            >>> engine = Engine(load("run")[0])
            >>> completions = engine.run([[256, 97], [256, 98, 99]], SamplingOptions(max_new_tokens=4))
        """
        requests = [self._request(prompt, options) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in requests]
        reasons: dict[int, FinishReason] = {}
        others: list[Output] = []
        with self._stepping():
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
        logprobs: int | None = None,
    ) -> Request:
        options = SamplingOptions() if options is None else options
        check_options(options)
        check_callback("is_finished", is_finished)
        check_callback("on_error", on_error)
        if logprobs is not None:
            logprobs = whole_number("logprobs", logprobs, at_least=0)
        vocab_size = self.model.config.vocab_size
        tokens = token_ids("prompt", prompt, vocab_size)
        if not tokens:
            raise ValueError("prompt must hold at least one token")
        self.model.config.check_length(len(tokens) + options.max_new_tokens - 1)
        if stop_token_ids is None:
            stop = default_stop_token_ids(self.model)
        else:
            stop = frozenset(token_ids("stop_token_ids", stop_token_ids, vocab_size))
        sampler = Sampler(options, tokens, vocab_size, self.model.device)
        history = History(self.prefix_block, tokens)
        return Request(history, len(tokens), options, sampler, stop, is_finished, on_error, logprobs)

    def _enqueue(self, request: Request) -> int:
        with self._lock:
            request.id, self._next_id = self._next_id, self._next_id + 1
            self._waiting[request.id] = request
        return request.id

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        if not self._step_lock.acquire(blocking=False):
            raise RuntimeError("a step of this engine is running already: let one thread do all of them")
        try:
            yield
        finally:
            self._step_lock.release()

    def _step(self) -> list[Output]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            self._end(request, FinishReason.CANCELLED)
        self._forget_states_of_old_weights()
        self._decode()
        self._admit()
        self._prefill()
        with self._lock:
            outputs, self._outputs = self._outputs, []
        return outputs

    def _forget_states_of_old_weights(self) -> None:
        """Empty the prefix cache if weights have changed, and keep no states of requests that run."""
        if (version := self._weights.version) != self._weights_version:
            self._weights_version = version
            self._free(self.prefixes.make_room(self.prefixes.capacity))
            for request in self._running.values():
                request.is_kept = False

    def _decode(self) -> None:
        """Generate a token for every request whose prompt has been read."""
        decoding = [request for request in self._running.values() if request.is_decoding]
        if not decoding:
            return
        with self._updating(decoding) as in_flight:
            logits = self._decoder(
                [request.history.tokens[-1] for request in decoding],
                [request.num_read for request in decoding],
                [request.slot for request in decoding],
                self._weights_version,
            )
            for request in decoding:
                request.num_read += 1
            self._choose(logits, decoding, in_flight)

    def _admit(self) -> None:
        """Give slots to waiting requests, with the state of the longest cached prefix."""
        while len(self._running) < self.max_requests:
            with self._lock:
                request = next(iter(self._waiting.values()), None)
            if request is None:
                return
            with self._updating([request]) as in_flight:
                request.slot = self.pool.allocate()
                if found := self.prefixes.find(request.history):
                    self.pool.copy(found.slot, request.slot)
                    request.num_read = found.length
                else:
                    self.pool.zero([request.slot])
                with self._lock:
                    self._running[request.id] = self._waiting.pop(request.id)
                in_flight.clear()

    def _prefill(self) -> None:
        """Read prompt chunks, and choose the first token after the prompts that end with them."""
        left = self.prefill_tokens
        while chunks := prompt_chunks(
            self._running.values(), left, self.prefixes.capacity, ends_at_saved=self.model.config.invariant
        ):
            left -= sum(chunk.stop - chunk.start for chunk in chunks)
            self._read_chunks(chunks)
            if not self.model.config.invariant:  # else chunks end where states are kept, before all tokens are read
                break

    def _read_chunks(self, chunks: list[PromptChunk]) -> None:
        with self._updating(chunk.request for chunk in chunks) as in_flight:
            saved = self._allocate_for_prefixes(sum(len(chunk.saved_at) for chunk in chunks))
            if self.model.config.invariant:
                hidden_states = self._read(chunks, [])
                for chunk, slot in zip((chunk for chunk in chunks if chunk.saved_at), saved, strict=True):
                    self.pool.copy(chunk.request.slot, slot)
            else:
                hidden_states = self._read(chunks, saved)
            for chunk in chunks:
                chunk.request.num_read = chunk.stop
                for length in chunk.saved_at:
                    self._free(self.prefixes.put(chunk.request.history, length, saved.pop(0)))
            ended = [i for i, chunk in enumerate(chunks) if chunk.request.is_decoding]
            in_flight[:] = requests = [chunks[i].request for i in ended]
            if requests:
                with torch.no_grad():
                    logits = self.model.compute_logits(hidden_states[self._tensor(ended)])
                self._choose(logits, requests, in_flight)

    def _read(self, chunks: list[PromptChunk], saved: list[int]) -> torch.Tensor:
        """Advance the states of the requests; return the hidden states at the chunk ends, `[N, W]`.

        Args:
            chunks: N chunks.
            saved: slots for the states that the chunks save.
        """
        starts = [0, *accumulate(chunk.stop - chunk.start for chunk in chunks)]
        tokens = [token for chunk in chunks for token in chunk.request.history.tokens[chunk.start : chunk.stop]]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.stop)]
        saved_after = [
            start + length - chunk.start
            for start, chunk in zip(starts, chunks, strict=False)
            for length in chunk.saved_at
        ]
        slots = Slots(
            self._tensor([chunk.request.slot for chunk in chunks]),
            self._tensor(saved) if saved else None,
            self._tensor(saved_after) if saved else None,
        )
        inputs = self._tensor([tokens, positions])
        return self.model.model.advance(inputs[:1], inputs[1:], self.pool.states, slots, self._tensor(starts))

    def _allocate_for_prefixes(self, count: int) -> list[int]:
        if count:
            self._free(self.prefixes.make_room(count))
        return [self.pool.allocate() for _ in range(count)]

    @contextmanager
    def _updating(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Update the states of requests; an exception ends the requests that are still in the list as failed.

        Their states may hold half of a step. Slots that no request or prefix uses are freed.
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
                request.report(error)
            if not isinstance(error, Exception):
                raise

    def _choose(self, logits: torch.Tensor, requests: list[Request], in_flight: list[Request]) -> None:
        """Choose the next token of each request and end finished ones; an error of a callback ends its request."""
        tokens = choose_each(logits, [request.sampler for request in requests])
        logprobs = logprobs_by_request(logits, tokens, requests)
        for token, request in zip(tokens, requests, strict=True):
            request.history.extend([] if token is None else [token])
        interruption: BaseException | None = None
        for token, request in zip(tokens, requests, strict=True):
            failure: BaseException | None = None
            try:
                reason = request.finish_reason(token)
            except BaseException as error:
                reason, failure = FinishReason.FAILED, error
            if reason is not None:
                self._end(request, reason, token, logprobs.get(request.id))
            else:
                with self._lock:
                    self._outputs.append(Output(request.id, token, None, logprobs.get(request.id)))
            in_flight.remove(request)
            if failure is not None:
                request.report(failure)
                if not isinstance(failure, Exception):
                    interruption = interruption or failure
        if interruption is not None:
            raise interruption

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        token: int | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """End a request unless it has ended; keep the state of a finished one in the prefix cache."""
        with self._lock:
            if request.id not in self._waiting and request.id not in self._running:
                return
            if request.is_cancelled and reason is not FinishReason.FAILED:
                reason = FinishReason.CANCELLED
            self._outputs.append(Output(request.id, token, reason, logprobs))
            self._waiting.pop(request.id, None)
            self._running.pop(request.id, None)
        if request.slot >= 0:
            is_kept = request.is_kept and reason in (FinishReason.STOP, FinishReason.LENGTH)
            self._free(
                self.prefixes.put(request.history, request.num_read, request.slot) if is_kept else [request.slot]
            )

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self.pool.free(slot)

    def _tensor(self, values: Sequence) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)
