"""Log-probabilities of new tokens, and of the most likely tokens in their place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .outputs import TokenLogprobs
from .requests import Request


def logprobs_by_request(
    logits: Tensor, tokens: Sequence[int | None], requests: Sequence[Request]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the model's distribution: before repetition penalty, temperature, top k and top p.

    Args:
        logits: `[B, vocab_size]`.
        tokens: chosen token of each request; None if its logits are not finite.
        requests: B requests.

    Returns:
        Log-probabilities by request number, for the requests that ask for them and have a token.
    """
    asking = [i for i, token in enumerate(tokens) if token is not None and requests[i].logprobs is not None]
    if not asking:
        return {}
    chosen = torch.tensor([tokens[i] for i in asking], device=logits.device)[:, None]
    counts = [requests[i].logprobs or 0 for i in asking]
    asked = logits[torch.tensor(asking, device=logits.device)]
    logprobs = asked.to(torch.promote_types(asked.dtype, torch.float32)).log_softmax(dim=-1)
    top = logprobs.topk(min(max(counts), logits.shape[1]), dim=-1)
    values = logprobs.gather(1, chosen)[:, 0].tolist(), top.indices.tolist(), top.values.tolist()
    return {
        requests[i].id: TokenLogprobs(logprob, dict(zip(ids[:count], top_values[:count], strict=True)))
        for i, count, logprob, ids, top_values in zip(asking, counts, *values, strict=True)
    }
