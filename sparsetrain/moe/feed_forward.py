"""Feed-forward networks, dense: a layer's own, or shared by all tokens of a mixture-of-experts layer.

Shapes: D model dim; ... any leading dims.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["swiglu", "gelu"]


class FeedForward(nn.Module):
    """swiglu: down(silu(gate(x)) · up(x)) (arXiv 2002.05202, eq. 6). gelu: down(gelu(up(x))), in the tanh form.

    Args:
        dim: Size of the activations, D.
        hidden_dim: Size inside.
        activation: Which of the two.
        bias: Whether the layers have biases.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden_dim, bias)
        self.down = nn.Linear(hidden_dim, dim, bias)

    def forward(self, x_D: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        if self.gate is None:
            hidden = F.gelu(self.up(x_D), approximate="tanh")
        else:
            hidden = F.silu(self.gate(x_D)) * self.up(x_D)
        y_D: Tensor = self.down(hidden)
        return y_D
