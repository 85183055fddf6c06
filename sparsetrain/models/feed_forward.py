"""Feed-forward layers.

Shapes: D model dim, F hidden dim; ... any leading dims.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases (arXiv 2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        y_D: Tensor = self.down(F.silu(self.gate(x_D)) * self.up(x_D))
        return y_D


class GeluFeedForward(nn.Module):
    """down(gelu(up(x))) with biases and the tanh form of GELU, as in GPT-2."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x_D: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        y_D: Tensor = self.down(F.gelu(self.up(x_D), approximate="tanh"))
        return y_D
