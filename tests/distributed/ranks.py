"""Processes for tests of several ranks, started once per session, and the jobs that they run."""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import Case, Inputs, make_inputs, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_attention import distributed
from lightning_attention.distributed import exchange
from lightning_attention.ops import custom_ops, states

WORLD_SIZE = 4
TIMEOUT_SECONDS = 180  # many processes start at once, and compile kernels on a GPU


class Ranks:
    """`ranks(job, *arguments)` runs `job(group, *arguments)` on the world ranks `members` and returns their results.

    Group ranks are in the order of `members`.
    """

    def __init__(self, folder: str):
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, f"file://{folder}/store", there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, job: Callable, *arguments: Any, members: Sequence[int] = range(WORLD_SIZE)) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((job, arguments, tuple(members)))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT_SECONDS), f"rank {rank} did not answer"
            results.append(torch.load(io.BytesIO(pipe.recv()), weights_only=False))
        for result in results:
            if isinstance(result, Exception):
                raise result
        return [results[rank] for rank in members]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, store: str, pipe: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=TIMEOUT_SECONDS / 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    groups: dict[tuple[int, ...], Any] = {tuple(range(WORLD_SIZE)): None}
    while (message := pipe.recv()) is not None:
        job, arguments, members = message
        if members not in groups:
            order: dict[str, Any] = {} if list(members) == sorted(members) else {"sort_ranks": False}
            groups[members] = dist.new_group(list(members), **order)
        try:
            result = job(groups[members], *arguments) if rank in members else None
        except Exception as error:  # raised by the test
            result = error
        buffer = io.BytesIO()
        torch.save(result, buffer)
        pipe.send(buffer.getvalue())
    dist.destroy_process_group()


def local_inputs(group: Any, inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """Inputs of this rank's tokens."""
    rank = dist.get_rank(group)
    stop = list(accumulate(lengths))[rank]
    here = slice(stop - lengths[rank], stop)
    return replace(inputs, **{name: getattr(inputs, name)[:, here] for name in ("q", "k", "v", "do")})


def attention(group: Any, **given: Any) -> Callable:
    """Attention with its final state, in the form that `oracle.run` calls."""

    def call(q, k, v, log_decay, **options):
        return distributed.lightning_attention(
            q, k, v, log_decay, group=group, output_final_state=True, **options, **given
        )

    return call


def without(attention: Callable, names: Sequence[str]) -> Callable:
    """Attention with some inputs or outputs detached."""

    def call(q, k, v, log_decay, **options):
        given = {"q": q, "k": k, "v": v} | options
        given |= {name: given[name].detach() for name in names if name in given}
        outputs = dict(zip(("o", "final_state"), attention(**given, log_decay=log_decay), strict=True))
        outputs |= {name: outputs[name].detach() for name in names if name in outputs}
        return outputs["o"], outputs["final_state"]

    return call


def results(
    group: Any,
    case: Case,
    dtype: torch.dtype,
    lengths: Sequence[int],
    given: dict,
    detached: Sequence[str] = (),
    chunk_size: int = states.CHUNK_SIZE,
) -> dict[str, Tensor]:
    """Outputs and gradients of this rank."""
    with patch.object(states, "CHUNK_SIZE", chunk_size):
        return run(without(attention(group, **given), detached), local_inputs(group, make_inputs(case, dtype), lengths))


@contextmanager
def messages_by_way_of_the_host() -> Iterator[None]:
    """Send GPU tensors through the host, which gloo cannot do itself; NCCL needs a GPU for every process.

    As with NCCL, a received tensor is ready for the stream that waits.
    """
    run, kept = dist.batch_isend_irecv, []

    class Batch:
        def __init__(self, operations: list[dist.P2POp]):
            self.operations = operations
            self.host = [operation.tensor.cpu() for operation in operations]
            kept.extend(self.host)
            self.works = run(
                [
                    dist.P2POp(operation.op, host, group=operation.group, group_peer=operation.group_peer)
                    for operation, host in zip(operations, self.host, strict=True)
                ]
            )

        def wait(self) -> None:
            for work in self.works:
                work.wait()
            for operation, host in zip(self.operations, self.host, strict=True):
                if operation.op is dist.irecv:
                    operation.tensor.copy_(host)

    with patch.object(dist, "batch_isend_irecv", lambda operations: [Batch(operations)]):
        yield


def results_on_a_gpu(
    group: Any, case: Case, dtype: torch.dtype, lengths: Sequence[int], strategy: str
) -> dict[str, Tensor]:
    """Outputs and gradients of this rank, on one GPU for all ranks."""
    inputs = local_inputs(group, make_inputs(case, dtype), lengths).on("cuda")
    with messages_by_way_of_the_host():
        found = run(attention(group, strategy=strategy), inputs)
    return {name: x.cpu() for name, x in found.items()}


@cache
def over_nccl(group: Any) -> Any:
    """NCCL group of the same ranks, each with a GPU."""
    torch.cuda.set_device(dist.get_rank(group))
    return dist.new_group(dist.get_process_group_ranks(group), backend="nccl", use_local_synchronization=True)


def results_over_nccl(
    group: Any, case: Case, dtype: torch.dtype, lengths: Sequence[int], given: dict
) -> dict[str, Tensor]:
    """Outputs and gradients of this rank, on a GPU of its own."""
    group = over_nccl(group)
    inputs = local_inputs(group, make_inputs(case, dtype), lengths).on("cuda")
    return {name: x.cpu() for name, x in run(attention(group, **given), inputs).items()}


def gradients(group: Any, case: Case, lengths: Sequence[int], given: dict) -> dict[str, Tensor | None]:
    """Gradients that `backward` leaves on this rank."""
    inputs = local_inputs(group, make_inputs(case), lengths)
    leaves = {name: getattr(inputs, name).requires_grad_() for name in ("q", "k", "v", "initial_state")}
    inputs = replace(inputs, **leaves)
    o, final_state = attention(group, **given)(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
    torch.autograd.backward([o, final_state], [inputs.do, inputs.d_final_state])
    return {name: leaf.grad for name, leaf in leaves.items()}


def results_checkpointed(group: Any, case: Case, lengths: Sequence[int], given: dict) -> dict[str, Tensor]:
    """Outputs and gradients under activation checkpointing."""

    def call(*arguments, **options):
        return checkpoint(attention(group, **given), *arguments, use_reentrant=False, **options)

    return run(call, local_inputs(group, make_inputs(case), lengths))


def output_under_autocast(group: Any, case: Case, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Outputs and states under autocast, and of bfloat16 inputs."""
    inputs = local_inputs(group, make_inputs(case, torch.float32), lengths)
    call = attention(group)
    with torch.autocast("cpu", torch.bfloat16):
        under = call(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
    inputs = inputs.to(torch.bfloat16)
    plain = call(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
    return torch.cat([x.flatten() for x in under]), torch.cat([x.flatten() for x in plain])


def bytes_sent(group: Any, case: Case, dtype: torch.dtype, lengths: Sequence[int], strategy: str) -> tuple[int, int]:
    """Bytes sent by this rank in the forward pass, and in the backward pass."""
    sent = 0
    gather, exchanged = dist.all_gather, dist.batch_isend_irecv

    def counted_gather(outputs, x, **options):
        nonlocal sent
        sent += (len(outputs) - 1) * x.nbytes
        return gather(outputs, x, **options)

    def counted_batch(operations):
        nonlocal sent
        sent += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return exchanged(operations)

    inputs = local_inputs(group, make_inputs(case, dtype), lengths)
    call = attention(group, lengths=lengths, strategy=strategy)
    with patch.object(dist, "all_gather", counted_gather), patch.object(dist, "batch_isend_irecv", counted_batch):
        o, _ = call(inputs.q, inputs.k.requires_grad_(), inputs.v, inputs.log_decay, **inputs.options())
        forward, sent = sent, 0
        o.backward(inputs.do)
    return forward, sent


def batches(group: Any, case: Case, lengths: Sequence[int]) -> list[list[tuple[str, int]]]:
    """Batches of sends and receives of a ring with their peers, in order, forward and backward."""
    made = []

    def recorded(operations):
        made.append([(operation.op.__name__, operation.group_peer) for operation in operations])
        return exchanged(operations)

    exchanged = dist.batch_isend_irecv
    with patch.object(dist, "batch_isend_irecv", recorded):
        run(attention(group, strategy="ring"), local_inputs(group, make_inputs(case), lengths))
    return made


def events(group: Any, case: Case, lengths: Sequence[int], strategy: str) -> list[str]:
    """Order of transfers and local attention in two layers, forward and backward."""
    happened = []

    def recorded(name: str, function: Callable) -> Callable:
        def call(*arguments):
            happened.append(name)
            return function(*arguments)

        return call

    def launched(*arguments):
        return recorded("wait", recorded("launch", launch)(*arguments))

    def layers(q, k, v, log_decay, **options):
        layer = attention(group, strategy=strategy, backend="chunked")
        return layer(q, k, layer(q, k, v, log_decay, **options)[0], log_decay, **options)

    launch = exchange.STRATEGIES[strategy]
    with ExitStack() as patches:
        patches.enter_context(patch.dict(exchange.STRATEGIES, {strategy: launched}))
        for name in ("forward", "backward"):
            patches.enter_context(patch.object(custom_ops, name, recorded(name, getattr(custom_ops, name))))
        run(layers, local_inputs(group, make_inputs(case), lengths))
    return happened
