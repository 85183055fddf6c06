"""What engine=megatron cannot lay over ranks, said before any worker starts."""

from collections.abc import Iterator

from sparsetrain.config.conflict import Conflict
from sparsetrain.config.origin import KeyPath
from sparsetrain.config.run import RunConfig
from sparsetrain.config.units import divisors_near

_PADDED_TO = 64
"""The vocabulary is rounded up to a multiple of this where model.vocab_size does not say how large it is."""


def megatron_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """What in a run with parallel.engine=megatron does not go together, whatever the number of ranks."""
    yield from _stages(config)
    yield from _shares_of_matrices(config)
    yield from _stretches(config)
    if config.model.moe is not None:
        yield from _experts(config)


def megatron_world_conflicts(config: RunConfig, world_size: int) -> Iterator[Conflict]:
    """Why `world_size` ranks cannot hold whole copies of the model."""
    parallel = config.parallel
    needed = parallel.model_ranks
    if world_size % needed:
        key = max(("tp", "pp", "cp"), key=lambda name: int(getattr(parallel, name)))
        message = (
            f"a copy of the model takes tp·pp·cp = {parallel.tp}·{parallel.pp}·{parallel.cp} = {needed} ranks, and "
            f"{world_size} are no multiple of that; {divisors_near(world_size, needed)} for the product"
        )
        yield Conflict(("parallel", key), getattr(parallel, key), message, (("cluster", "workers"),))


def _stages(config: RunConfig) -> Iterator[Conflict]:
    model, pp = config.model, config.parallel.pp
    layers: KeyPath = ("model", "num_layers")
    if pp > model.num_layers:
        message = f"a stage needs a layer at least, and the model has {model.num_layers}; write at most that"
        yield Conflict(("parallel", "pp"), pp, message, (layers,))
    elif model.num_layers % pp:
        message = (
            f"must divide model.num_layers={model.num_layers}, because stages have equally many layers; "
            + divisors_near(model.num_layers, pp)
        )
        yield Conflict(("parallel", "pp"), pp, message, (layers,))
    if pp > 1 and model.ties_embeddings:
        message = (
            "the embedding is on the first stage and the head on the last: with pp > 1 they cannot be one weight; "
            "write false, or pp: 1"
        )
        yield Conflict(("model", "tie_embeddings"), model.tie_embeddings, message, (("parallel", "pp"),))


def _shares_of_matrices(config: RunConfig) -> Iterator[Conflict]:
    model, tp, cp = config.model, config.parallel.tp, config.parallel.cp
    for key, heads in {"num_heads": model.num_heads, "num_kv_heads": model.kv_heads}.items():
        for name, size in {"tp": tp, "cp": tp * cp}.items():
            if heads % size:
                what = "tp" if name == "tp" else f"tp·cp = {tp}·{cp}"
                yield _indivisible(config, name, f"{what} must divide model.{key}={heads}", heads, size, key)
                break
    has_dense_layers = len(model.moe_layers) < model.num_layers
    if has_dense_layers and model.hidden_dim % tp:
        message = f"must divide model.ffn_dim={model.hidden_dim}"
        yield _indivisible(config, "tp", message, model.hidden_dim, tp, "ffn_dim")
    rows = model.vocab_size or _PADDED_TO
    if rows % tp:
        reason = f"must divide model.vocab_size={rows}"
        if model.vocab_size is None:
            reason = f"must divide the vocabulary, which is padded to a multiple of {_PADDED_TO}; set model.vocab_size"
        yield _indivisible(config, "tp", reason, rows, tp, "vocab_size")


def _indivisible(config: RunConfig, key: str, reason: str, whole: int, size: int, other: str) -> Conflict:
    message = f"{reason}; {divisors_near(whole, size)}"
    return Conflict(("parallel", key), getattr(config.parallel, key), message, (("model", other),))


def _stretches(config: RunConfig) -> Iterator[Conflict]:
    """Samples that cannot be cut evenly among ranks."""
    parallel = config.parallel
    size = parallel.cp * (parallel.tp if parallel.sp else 1)
    for index, phase in enumerate(config.phases):
        seq_len = phase.data.seq_len
        if seq_len % size:
            section: KeyPath = ("train", "phases", index - 1) if index else ()
            names = "cp·tp (with sp)" if parallel.sp else "cp"
            message = f"{size} ranks ({names}) share the tokens of a sample; write a multiple of {size}"
            others: tuple[KeyPath, ...] = (("parallel", "cp"), ("parallel", "tp"))
            yield Conflict((*section, "data", "seq_len"), seq_len, message, others)


def _experts(config: RunConfig) -> Iterator[Conflict]:
    moe, parallel = config.model.moe, config.parallel
    assert moe is not None
    if parallel.tp > 1 and not parallel.sp:
        message = (
            "experts get tokens from every tensor-parallel rank, each its own: with model.moe and tp > 1 write true, "
            "or tp: 1"
        )
        yield Conflict(("parallel", "sp"), False, message, (("parallel", "tp"), ("model", "moe")))
    if moe.router.kind == "hash":
        message = "hash looks at token ids, which Megatron's layers do not get; use another, or parallel.engine=torch"
        yield Conflict(("model", "moe", "router"), "hash", message, (("parallel", "engine"),))
    if moe.aux_scope == "sequence" and (parallel.cp > 1 or parallel.sp):
        message = (
            "ranks with cp or sp see parts of sequences; write micro_batch, or leave out parallel.cp and parallel.sp"
        )
        yield Conflict(("model", "moe", "aux_scope"), "sequence", message, (("parallel", "cp"), ("parallel", "sp")))
