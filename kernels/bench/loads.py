"""Loads of experts that MoE layers are measured under."""

from pathlib import Path


def save_steady_load(
    path: Path, scenario: str, *, num_ranks: int, num_experts: int, top_k: int, tokens_per_rank: int
) -> None:
    """Write a trace for replaying routers: a scenario's first step, which every step then has.

    Args:
        path: A file to write, .npz.
        scenario: L0 to L7, as in `sparsetrain.moe.placement.scenario`.
        num_ranks: Of the layer.
        num_experts: Likewise.
        top_k: Experts of a token.
        tokens_per_rank: Of a step.
    """
    from sparsetrain.moe.placement import TraceRecorder
    from sparsetrain.moe.placement import scenario as load_of

    counts_SE = load_of(scenario, num_experts, num_ranks, seed=0).counts_SE(0, tokens_per_rank * top_k)
    recorder = TraceRecorder(top_k)
    recorder.append(0, counts_SE.sum(axis=0)[None], counts_SE[None])
    recorder.trace().save(path)
