"""What a step cost and how fast it was: the row of metrics.jsonl, and the sums behind summary.json."""

from contextlib import AbstractContextManager
from typing import Any

from sparsetrain.config import TrainConfig
from sparsetrain.planning.flops import ModelFlops
from sparsetrain.sparsity import Sparsifier
from sparsetrain.training.metrics import Throughput
from sparsetrain.training.phase_plan import PhasePlan
from sparsetrain.training.sparse_layers import SparseLayers
from sparsetrain.training.state import RunState
from sparsetrain.training.step import StepResult


class Accountant:
    """Counts the steps of one phase.

    Args:
        sparsity: The phase's masks.
        layers: What kernels do with their zeros.
        flops: What a token costs.
        train: Whether activations are computed twice.
        peak_flops: Matmul peak of all ranks together, FLOP/s.
    """

    def __init__(
        self, sparsity: Sparsifier, layers: SparseLayers, flops: ModelFlops, train: TrainConfig, peak_flops: float
    ) -> None:
        self._sparsity = sparsity
        self._layers = layers
        self._flops = flops
        self._recomputes = train.activation_checkpointing
        self._peak_flops = peak_flops
        self._meter = Throughput()
        # Masks change after a step: what the next one multiplies with is noted when this one is over.
        self._densities, self._gradient_densities = sparsity.densities(), sparsity.weight_gradient_densities()
        self._skipped_per_token = layers.skipped_flops_per_token()
        self._nonzero_parameters = self._nonzero_linear_parameters()

    def paused(self) -> AbstractContextManager[None]:
        """What happens inside is not training, and not counted."""
        return self._meter.paused()

    def count(self, plan: PhasePlan, state: RunState, result: StepResult) -> dict[str, Any]:
        """Add a step to the phase's sums in `state`; returns its row of metrics.jsonl."""
        flops = self._flops
        if result.experts is not None:
            flops = flops.with_experts_per_token(result.experts.computed / result.num_tokens)
        dense_flops = flops.train_per_token() * result.num_tokens
        # Where masks are on dense kernels every zero is multiplied: what is executed is the dense model.
        model_flops = dense_flops - self._skipped_per_token * result.num_tokens
        recomputed_flops = flops.layers_forward_per_token() * result.num_tokens if self._recomputes else 0.0
        seconds = self._meter.step_done(result.num_tokens, model_flops)
        totals = state.current
        totals.steps += 1
        totals.tokens += result.num_tokens
        totals.seconds += seconds
        totals.density = self._sparsity.density
        sparse_flops = flops.train_per_token(self._densities, weight_gradient_densities=self._gradient_densities)
        totals.train_flops += sparse_flops * result.num_tokens
        totals.model_flops += model_flops
        totals.executed_flops += model_flops + recomputed_flops
        totals.dense_train_flops += dense_flops
        totals.attention_flops_saved += flops.attention_saved_per_token * result.num_tokens
        totals.nonzero_steps += self._nonzero_parameters
        self._densities = totals.layer_density = self._sparsity.densities()
        self._gradient_densities = self._sparsity.weight_gradient_densities()
        if self._sparsity.masks_changed or not totals.sparse_layers:
            self._skipped_per_token = self._layers.skipped_flops_per_token()
            totals.sparse_layers = self._layers.summaries()
        self._nonzero_parameters = self._nonzero_linear_parameters()
        state.final_loss = result.loss if result.is_finite else None
        row = {
            "step": state.step,
            "phase": plan.phase.name,
            "tokens": state.tokens,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": self._meter.tokens_per_s,
            "mfu": self._meter.executed_flops_per_s / self._peak_flops,
            "density": totals.density,
            "step_time_s": seconds,
        }
        if self._sparsity.masks_changed:
            row |= {"flip_rate": self._sparsity.flip_rate, "sad": self._sparsity.sad}
        if result.experts is not None:
            row |= expert_figures(result)
        if state.bad_steps:
            row["bad_steps"] = state.bad_steps
        return row

    def _nonzero_linear_parameters(self) -> float:
        zeros = sum(
            weight.numel - weight.nonzeros for weight in self._sparsity.report() if weight.name in self._flops.linear
        )
        return self._flops.num_linear_parameters - zeros


def expert_figures(result: StepResult) -> dict[str, Any]:
    """What a row of metrics.jsonl says of experts; see `metrics`."""
    report = result.experts
    assert report is not None
    return {
        "aux_loss": result.aux_loss,
        "expert_imbalance": report.expert_imbalance,
        "device_imbalance": report.device_imbalance,
        "replicas": report.replicas,
        "moved_bytes": report.moved_bytes,
        "dropped_tokens": report.dropped,
        "pipeline_degree": report.degree,
    }
