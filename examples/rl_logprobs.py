"""Reinforcement learning: are log-probabilities the same while a token is sampled and while it is trained on?

python examples/rl_logprobs.py
python examples/rl_logprobs.py --checkpoint run --requests 64 --new-tokens 256
"""

from itertools import accumulate, chain
from math import floor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_attention import (
    DecodingState,
    decay,
    lightning_attention,
    lightning_attention_prefill_,
    lightning_attention_step,
)
from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.models import LightningConfig, LightningForCausalLM

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
AtLeastOne = Annotated[int, typer.Option(min=1)]


def main(checkpoint: Path | None = None, requests: AtLeastOne = 16, new_tokens: AtLeastOne = 64) -> dict[str, float]:
    """Sample with the engine, compute the same log-probabilities in a training step, and compare."""
    table, shares = Table("invariant", "", "equal", "largest difference", box=None), {}
    for invariant in (False, True):
        torch.manual_seed(0)  # the same inputs, weights and prompts
        pairs = {"attention": attention(requests, new_tokens, invariant)}
        pairs["log-probabilities"] = old, new = logprobs(make_model(checkpoint, invariant), requests, new_tokens)
        pairs["importance ratios and 1"] = torch.ones_like(new), (new - old).exp()
        for name, (x, y) in pairs.items():
            shares[name] = (x == y).double().mean().item()
            equal = f"{floor(1000 * shares[name]) / 10} %"  # 100 % is all
            table.add_row(str(invariant), name, equal, f"{(x - y).abs().max().item():.2g}")
    console = Console(soft_wrap=True)
    console.print(f"{requests} requests of {new_tokens} new tokens, {DEVICE}, {DTYPE}", table, sep="\n")
    different = [name for name, share in shares.items() if share < 1]
    console.print(
        f"with invariant=True, not all equal: {', '.join(different)}; docs/determinism.md says why"
        if different
        else "with invariant=True, all equal to the last bit"
    )
    return shares


def make_model(checkpoint: Path | None, invariant: bool) -> LightningForCausalLM:
    """A checkpoint, or a small model with random weights."""
    if checkpoint is not None:
        model = LightningForCausalLM.from_pretrained(checkpoint, invariant=invariant)
    else:
        sizes: dict[str, Any] = {"vocab_size": 256, "initializer_range": 0.1}
        model = LightningForCausalLM(LightningConfig.from_size("demo", **sizes, invariant=invariant))
    return model.to(DEVICE, DTYPE)


def logprobs(model: LightningForCausalLM, requests: int, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of sampled tokens in the engine, and in a training pass over all sequences in a batch row."""
    engine = Engine(model, max_requests=max(1, requests // 2), ring=model.config.invariant)  # half of them wait
    sequences, sampled = {}, {}
    for seed in range(requests):
        prompt = torch.randint(model.config.vocab_size, (1 + 7 * seed % 100,)).tolist()
        options = SamplingOptions(max_new_tokens=new_tokens, seed=seed)
        request = engine.submit(prompt, options, stop_token_ids=(), logprobs=0)
        sequences[request], sampled[request] = prompt, []
    while engine.has_work:
        for output in engine.step():
            if output.token is None or output.logprobs is None:
                raise ValueError("the logits of this checkpoint are not finite")
            sequences[output.request].append(output.token)
            sampled[output.request].append(output.logprobs.chosen)

    model.train()
    lengths = [len(tokens) for tokens in sequences.values()]
    ids = torch.tensor([*chain(*sequences.values())], device=DEVICE)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
    logits = model(ids[None], position_ids=positions[None]).logits[0, :-1]
    of_next = logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    new = torch.cat([of_next[end - 1 - new_tokens : end - 1] for end in accumulate(lengths)])
    old = torch.tensor([*chain(*sampled.values())], device=DEVICE)
    (new - old).exp().mean().backward()  # the importance ratios of PPO and GRPO, with advantages of 1
    return old, new.detach()


@torch.no_grad()
def attention(requests: int, new_tokens: int, invariant: bool) -> tuple[Tensor, Tensor]:
    """Outputs of prefill and steps, and of one call over whole sequences."""
    H, D, prompt = 4, 64, 50
    q, k, v = (torch.randn(requests, prompt + new_tokens, H, D, device=DEVICE, dtype=DTYPE) for _ in range(3))
    log_decay = decay.log_decay(H, preset="alibi").to(DEVICE)
    state: Tensor | DecodingState = torch.zeros(requests, H, D, D, device=DEVICE)
    if invariant:
        state = DecodingState.zeros(requests, H, D, D, dtype=DTYPE, device=DEVICE)
    read = q[:, :prompt], k[:, :prompt], v[:, :prompt], log_decay
    outputs = [lightning_attention_prefill_(*read, state=state, invariant=invariant)]
    for t in range(prompt, prompt + new_tokens):
        token = q[:, t], k[:, t], v[:, t], log_decay
        outputs.append(lightning_attention_step(*token, state=state)[:, None])
    return torch.cat(outputs, dim=1), lightning_attention(q, k, v, log_decay, invariant=invariant).output


if __name__ == "__main__":
    typer.run(main)
