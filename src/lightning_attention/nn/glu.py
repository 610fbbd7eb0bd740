"""Channel mixing."""

from torch import Tensor, nn


class SimpleGLU(nn.Module):
    """SGLU: `W_o((x W_v) ⊙ (x W_u))`, a gated linear unit without activation; no biases.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.

    Source: TransNormerLLM (arXiv 2307.14995), section 3.1.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.vu_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v, u = self.vu_proj(x).chunk(2, dim=-1)
        return self.out_proj(v * u)
