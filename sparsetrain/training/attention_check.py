"""Whether every query of a model sees a key; found out before a worker starts."""

from collections.abc import Iterator

from torch import Tensor

from sparsetrain.config import BlockSparseAttention, InvalidConfig, Problem, RunConfig
from sparsetrain.config.problem import show
from sparsetrain.models.attention_layouts import attention_layout

_KEY = ("model", "attention", "heads")


def check_attention(config: RunConfig) -> None:
    """Make sure that the attention patterns leave no query without keys at any sample length of a run.

    What a query sees does not depend on what comes after it, so the longest samples speak for all.

    Raises:
        ConfigError: A pattern leaves a block of queries without keys; or without its own, and attention stays within
            documents, the first tokens of which may then see nothing.
    """
    attention = config.model.attention
    if not isinstance(attention, BlockSparseAttention):
        return
    longest = max(phase.data.seq_len for phase in config.phases)
    seen_HQK = attention_layout(attention, config.model.num_heads, longest, allow_empty=True).to_mask()
    problems = list(_problems(attention, seen_HQK.expand(config.model.num_heads, -1, -1)))
    if problems:
        raise InvalidConfig(config.name, problems)


def _problems(attention: BlockSparseAttention, seen_HQK: Tensor) -> Iterator[Problem]:
    """One for each pattern that a head is left blind by."""
    told = set()
    for head, place in enumerate(attention.pattern_places(len(seen_HQK))):
        seen_QK = seen_HQK[head]
        enough_Q = seen_QK.diagonal() if attention.within_documents else seen_QK.any(-1)
        if bool(enough_Q.all()) or place in told:
            continue
        told.add(place)
        blind = (~enough_Q).nonzero().flatten().tolist()
        what = "does not see itself, and with within_documents a document may begin there"
        written = attention.heads[place].model_dump(exclude_defaults=True)
        yield Problem(
            (*_KEY, place),
            f"{show(written)}: block {blind[0]} of the queries of head {head} "
            f"{what if attention.within_documents else 'sees no key'} ({len(blind)} of {len(enough_Q)} blocks); "
            "combine it with the nearest blocks: "
            "{kind: union, of: [{kind: local, width: 1}, ...]}",
        )
