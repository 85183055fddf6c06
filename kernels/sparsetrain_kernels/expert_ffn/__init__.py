"""Feed-forward networks of experts, each applied to its own rows."""

from sparsetrain_kernels.expert_ffn.lists import expert_ffn_backward, expert_ffn_forward
from sparsetrain_kernels.expert_ffn.op import expert_ffn, moe_ffn

__all__ = ["expert_ffn", "expert_ffn_backward", "expert_ffn_forward", "moe_ffn"]
