"""`model.moe`: feed-forward layers of which each token uses a few experts."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sparsetrain.config.base import Int, KeyConflict, Real, Section, kind_from_text
from sparsetrain.config.layers import Layers, layer_indices
from sparsetrain.config.units import Count


class SoftmaxTopK(Section):
    """The top_k experts of the largest softmax probability (Mixtral, Switch)."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    renormalise: bool = True
    """Divide a token's weights by their sum, so that they add up to 1."""


class SigmoidTopK(Section):
    """Sigmoid scores, balanced without a loss by a bias on the choice (DeepSeek-V3; arXiv 2408.15664)."""

    kind: Literal["sigmoid_topk"]
    bias_update_rate: Real = Field(default=1e-3, ge=0)
    """How far an expert's bias moves a step, up where it got less than the mean load and down where more."""
    renormalise: bool = True
    """Divide a token's weights by their sum."""
    scale: Real = Field(default=1.0, gt=0)
    """Factor on all weights, after they were renormalised."""


class ExpertChoice(Section):
    """Each expert chooses tokens, top_k/num_experts of each sequence (arXiv 2202.09368). Looks at later tokens."""

    kind: Literal["expert_choice"]


class Hash(Section):
    """Fixed experts for each token id, at random (arXiv 2106.04426); nothing is learned."""

    kind: Literal["hash"]
    seed: Int = Field(default=0, ge=0)
    """Chooses the assignment; layers differ from each other anyway."""


class DenseToSparse(Section):
    """All experts at first, fewer and fewer as the gate's temperature falls (EvoMoE, arXiv 2112.14397)."""

    kind: Literal["dense_to_sparse"]
    start_temperature: Real = Field(default=2.0, gt=0)
    end_temperature: Real = Field(default=0.3, gt=0)
    threshold: Real = Field(default=0.01, ge=0, lt=1)
    """Experts of a smaller probability are left out, but for the top_k."""
    until: Annotated[Real, Field(gt=0, le=1)] = 0.5
    """Fraction of the training at which the temperature has reached its end and a token uses top_k experts only."""
    noise: bool = False
    """Gumbel noise on the logits in training, as in the paper; results then depend on the number of ranks."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.end_temperature > self.start_temperature:
            raise KeyConflict("end_temperature", f"must not be above start_temperature={self.start_temperature}")
        return self


class ReluGate(Section):
    """Every expert with a positive score, weighted by RMSNorm(ReLU(scores)) (BlockFFN, arXiv 2507.08771).

    How many experts a token uses is learned, pressed down by two losses; top_k is what FLOPs are planned with.
    """

    kind: Literal["relu"]
    chunk: Int = Field(default=64, gt=1)
    """Consecutive tokens that should get along with few experts together."""
    chunk_loss: Real = Field(default=0.05, ge=0)
    """Weight of the share of experts that a chunk uses."""
    locality_loss: Real = Field(default=2e-3, ge=0)
    """Weight of the difference between the experts of neighbouring tokens."""


class Replay(Section):
    """Assigns tokens so that experts get the load of a recorded or synthetic trace; for benchmarks."""

    kind: Literal["replay"]
    trace: str = Field(min_length=1)
    """File of a load trace (.npz), of a model with as many MoE layers and experts. Steps beyond its end begin anew."""


RouterConfig = SoftmaxTopK | SigmoidTopK | ExpertChoice | Hash | DenseToSparse | ReluGate | Replay

AnyRouter = Annotated[Annotated[RouterConfig, Field(discriminator="kind")], BeforeValidator(kind_from_text)]


_CANNOT_BALANCE = ("expert_choice", "hash")
"""Routers whose load no loss can change."""


class MoeConfig(Section):
    """Mixture-of-experts layers in place of feed-forward layers."""

    num_experts: Int = Field(gt=0)
    """Experts of a layer."""
    top_k: Int = Field(default=2, gt=0)
    """Experts that a token uses."""
    ffn_dim: Count | None = Field(default=None, gt=0)
    """Width inside an expert; default that of the feed-forward layer it stands for."""
    layers: Layers = "all"
    """all, {every: k} for the last of every k layers, or a list of layers, counted from 0."""
    router: AnyRouter = SoftmaxTopK()
    """How tokens get their experts: a name, or {kind: name, ...}."""
    shared_experts: Int = Field(default=0, ge=0)
    """Experts that every token uses besides its own."""
    capacity_factor: Real | None = Field(default=None, gt=0)
    """Rows an expert takes at most, in units of the mean; null: as many as come, nothing is dropped."""
    overflow: Literal["drop", "pad"] = "drop"
    """With a capacity_factor. drop: leave out what exceeds it, the latest tokens first. pad: also fill each expert up
    to it, so that all shapes are fixed."""
    aux_loss: Real | None = Field(default=None, ge=0)
    """Weight of the load-balance loss; default 0.01 where the router needs one, else 0."""
    aux_scope: Literal["micro_batch", "sequence"] = "micro_batch"
    """Balance over the tokens of a micro-batch, or of each sequence, which does not depend on how a batch is cut."""
    z_loss: Real = Field(default=0.0, ge=0)
    """Weight of the mean squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k > self.num_experts:
            raise KeyConflict("top_k", f"a token cannot use more experts than num_experts={self.num_experts}")
        if self.overflow != "drop" and self.capacity_factor is None:
            raise KeyConflict("overflow", "nothing overflows without a capacity_factor; set one, or remove this key")
        kind = self.router.kind
        if self.aux_loss and kind in _CANNOT_BALANCE:
            raise KeyConflict("aux_loss", f"the load of router={kind} is not learned; remove this key")
        if self.z_loss and kind == "hash":
            raise KeyConflict("z_loss", "router=hash has no logits; remove this key")
        return self

    @property
    def balance_weight(self) -> float:
        """`aux_loss`, with the router's default filled in."""
        if self.aux_loss is not None:
            return self.aux_loss
        return 0.01 if self.router.kind in ("softmax_topk", "dense_to_sparse") else 0.0

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Which of a model's layers are MoE layers, ascending.

        Raises:
            KeyConflict: `layers` names a layer that the model does not have, or one twice, or none is left.
        """
        return layer_indices(self.layers, num_layers, none_left="no layer would be MoE")
