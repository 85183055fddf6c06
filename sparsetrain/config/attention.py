"""`model.attention`: which keys a query sees, in which layers and heads."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sparsetrain.config.base import Int, KeyConflict, Section, kind_from_text
from sparsetrain.config.layers import Layers, layer_indices


def _at_least(number: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Unlike `min_length` this says nothing where a member is wrong, which has been said by then."""

    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(values) < number:
            raise ValueError(f"expected at least {number} value(s), and there are {len(values)}")
        return values

    return check


class DenseAttention(Section):
    """Every query sees every earlier key."""

    kind: Literal["dense"] = "dense"
    within_documents: bool = False
    """Keep queries from seeing keys of another document packed into the same sample."""


class HeadPattern(Section):
    """Which blocks of keys each block of queries of a head sees; later keys are always hidden."""

    num_heads: Int | None = Field(default=None, gt=0)
    """Heads that have this pattern, one after the other; without it in any pattern, heads take the patterns in turn."""


class DensePattern(HeadPattern):
    """Every earlier block."""

    kind: Literal["dense"]


class Local(HeadPattern):
    """The nearest blocks."""

    kind: Literal["local"]
    width: Int = Field(gt=0)
    """Blocks, the query's own included."""


class Sink(HeadPattern):
    """The first blocks of the sequence (arXiv 2309.17453)."""

    kind: Literal["sink"]
    width: Int = Field(gt=0)
    """Blocks."""


class Strided(HeadPattern):
    """Every stride-th block of the sequence (S2-Attention, arXiv 2407.17678)."""

    kind: Literal["strided"]
    stride: Int = Field(gt=0)
    """Blocks from one to the next."""
    offset: Int | None = Field(default=None, ge=0)
    """The first of them; default the head's number, so that any `stride` heads in a row share out the whole context."""


class Dilated(HeadPattern):
    """A window with gaps (Longformer, arXiv 2004.05150)."""

    kind: Literal["dilated"]
    width: Int = Field(gt=0)
    """Blocks, the query's own included."""
    dilation: Int = Field(gt=0)
    """Blocks from one to the next."""


class Random(HeadPattern):
    """Earlier blocks drawn at random, for each block of queries and each head anew (BigBird, arXiv 2007.14062)."""

    kind: Literal["random"]
    count: Int = Field(gt=0)
    """Blocks."""
    seed: Int = Field(default=0, ge=0, lt=2**63)


SinglePattern = DensePattern | Local | Sink | Strided | Dilated | Random
_AnySingle = Annotated[Annotated[SinglePattern, Field(discriminator="kind")], BeforeValidator(kind_from_text)]


class _Combination(HeadPattern):
    of: tuple[HeadPattern, ...]
    """What is combined."""

    @model_validator(mode="after")
    def _heads_are_counted_once(self) -> Self:
        for index, part in enumerate(self.of):
            if part.num_heads is not None:
                raise KeyConflict(
                    f"of.{index}.num_heads", "a part of a pattern has no heads of its own; write it outside"
                )
        return self


class Intersection(_Combination):
    """Blocks that all of several patterns see."""

    kind: Literal["intersection"]
    of: Annotated[tuple[_AnySingle, ...], AfterValidator(_at_least(2))]


class Union(_Combination):
    """Blocks that any of several patterns sees."""

    kind: Literal["union"]
    of: Annotated[
        tuple[
            Annotated[
                Annotated[SinglePattern | Intersection, Field(discriminator="kind")], BeforeValidator(kind_from_text)
            ],
            ...,
        ],
        AfterValidator(_at_least(2)),
    ]


PatternConfig = SinglePattern | Union | Intersection
_AnyPattern = Annotated[Annotated[PatternConfig, Field(discriminator="kind")], BeforeValidator(kind_from_text)]


class BlockSparseAttention(Section):
    """In some layers each head's queries see some blocks of keys only."""

    kind: Literal["block_sparse"]
    block: Int = Field(default=64, ge=16, multiple_of=16)
    """Tokens of a block, a multiple of 16; the last block of a sequence may be shorter."""
    heads: Annotated[tuple[_AnyPattern, ...], AfterValidator(_at_least(1))]
    """The patterns of the heads, which take them in turn; or with num_heads in each, so many heads each."""
    layers: Layers = "all"
    """all, {every: k} for the last of every k layers, or a list of layers, counted from 0; the others are dense."""
    within_documents: bool = False
    """Keep queries from seeing keys of another document packed into the same sample, in the dense layers, too."""

    def head_patterns(self, num_heads: int) -> tuple[PatternConfig, ...]:
        """The pattern of each head.

        Raises:
            KeyConflict: The patterns do not add up to the heads.
        """
        return tuple(self.heads[place] for place in self.pattern_places(num_heads))

    def pattern_places(self, num_heads: int) -> tuple[int, ...]:
        """Of each head, which of `heads` it has.

        Raises:
            KeyConflict: The patterns do not add up to the heads.
        """
        counted = [pattern.num_heads for pattern in self.heads if pattern.num_heads is not None]
        if not counted:
            if len(self.heads) > num_heads:
                raise KeyConflict(
                    "heads", f"{len(self.heads)} patterns for num_heads={num_heads}; remove some, or raise num_heads"
                )
            return tuple(head % len(self.heads) for head in range(num_heads))
        if len(counted) < len(self.heads):
            without = next(place for place, pattern in enumerate(self.heads) if pattern.num_heads is None)
            raise KeyConflict(
                f"heads.{without}", "has no num_heads and another pattern has; write it in all of them, or in none"
            )
        if sum(counted) != num_heads:
            raise KeyConflict(
                "heads",
                f"num_heads is {' + '.join(map(str, counted))} in them; must add up to model.num_heads={num_heads}",
            )
        return tuple(place for place, count in enumerate(counted) for _ in range(count))

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Which of a model's layers are sparse, ascending.

        Raises:
            KeyConflict: `layers` names a layer that the model does not have, or one twice, or none is left.
        """
        return layer_indices(self.layers, num_layers, none_left="no layer would be sparse")


def _kind_from_keys(value: Any) -> Any:
    """Let `{within_documents: true}` stand for dense attention."""
    if isinstance(value, dict) and "kind" not in value and value.keys() <= {"within_documents"}:
        return {"kind": "dense", **value}
    return kind_from_text(value)


Attention = Annotated[
    Annotated[DenseAttention | BlockSparseAttention, Field(discriminator="kind")], BeforeValidator(_kind_from_keys)
]
