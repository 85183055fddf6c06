"""BlockLayout: what patterns see, conversions both ways, slices, and which blocks need a mask."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsetrain_kernels.block_layout import (
    PATTERNS,
    BlockLayout,
    Dense,
    Dilated,
    Document,
    Explicit,
    Local,
    Pattern,
    Random,
    Sink,
    Strided,
)
from sparsetrain_kernels.block_layout.ranges import END, FIRST, FULL, NOT_FULL
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask


def seen(pattern: Pattern, query_block: int, *, head: int = 0, num_blocks: int = 8, causal: bool = True) -> list[int]:
    """Key blocks that a query block sees, blocks of 4 tokens."""
    mask = pattern.mask(num_blocks * 4, 4, head=head, causal=causal)
    return mask[query_block].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Dense(), [0, 1, 2, 3, 4, 5]),
        (Local(2), [4, 5]),
        (Sink(2), [0, 1]),
        (Strided(3, offset=1), [1, 4]),
        (Dilated(2, 3), [2, 5]),
        (Document((0, 10, 32)), [2, 3, 4, 5]),
        (Explicit(torch.eye(8, dtype=torch.bool)), [5]),
        (Local(2) | Sink(1), [0, 4, 5]),
        (Strided(2, offset=0) & Local(3), [4]),
    ],
    ids=str,
)
def test_pattern_sees_what_it_says_under_causality(pattern: Pattern, expected: list[int]) -> None:
    assert seen(pattern, 5) == expected


def test_without_causality_windows_reach_both_ways() -> None:
    assert seen(Local(2), 5, causal=False) == [4, 5, 6]
    assert seen(Dilated(2, 2), 5, causal=False) == [3, 5, 7]
    assert seen(Document((0, 10, 32)), 2, causal=False) == list(range(8))  # block 2 holds tokens of both


def test_strided_heads_share_out_the_whole_context() -> None:
    layout = BlockLayout.build(Strided(4) | Local(1), 32 * 4, block=4, num_heads=4)
    assert layout.num_heads == 4
    assert torch.equal(layout.to_mask().any(0), torch.ones(32, 32).tril().bool())
    remote = layout.to_mask() & ~torch.eye(32, dtype=torch.bool)
    assert (remote.sum(0) <= 1).all()  # and none of it twice


def test_random_blocks_depend_on_seed_head_and_place_alone() -> None:
    mask = Random(3, seed=1).mask(32 * 4, 4, head=2, causal=True)
    assert torch.equal(mask.sum(-1), torch.arange(1, 33).clamp(max=3))
    assert torch.equal(Random(3, seed=1).mask(20 * 4, 4, head=2, causal=True), mask[:20, :20])
    for other in (
        Random(3, seed=2).mask(128, 4, head=2, causal=True),
        Random(3, seed=1).mask(128, 4, head=3, causal=True),
    ):
        assert not torch.equal(other, mask)


def test_random_blocks_are_spread_evenly() -> None:
    counts = sum(Random(4, seed=seed).mask(64, 1, head=0, causal=False).sum(0) for seed in range(50))
    assert isinstance(counts, Tensor)
    assert 150 < int(counts.min()) <= int(counts.max()) < 250  # 200 expected, standard deviation 14


def test_every_pattern_has_a_name_for_configurations() -> None:
    assert set(PATTERNS) == {"dense", "local", "sink", "strided", "dilated", "random", "document", "explicit"}


def test_heads_that_see_the_same_share_one_list() -> None:
    assert BlockLayout.build([Local(2), Local(2) | Sink(1)], 64, block=8).num_heads == 2
    assert BlockLayout.build([Local(2), Local(2)], 64, block=8).num_heads == 1
    assert BlockLayout.build(Strided(2, offset=0) | Local(1), 64, block=8, num_heads=6).num_heads == 1


masks = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31)).map(
    lambda drawn: torch.rand(drawn[:3], generator=torch.Generator().manual_seed(drawn[3])) < 0.5
)


@given(masks)
@settings(max_examples=30)
def test_lists_give_back_the_mask_they_were_made_of(mask: Tensor) -> None:
    layout = BlockLayout.from_mask(mask, 4)
    assert torch.equal(layout.to_mask(), mask)
    assert torch.equal(layout.columns.expand(), mask.mT)
    for head in range(len(mask)):
        for lines, blocks in ((layout.rows, mask[head]), (layout.columns, mask[head].T)):
            for line, expected in enumerate(blocks):
                first, end = lines.indptr[head, line : line + 2].tolist()
                assert lines.indices[head, first:end].tolist() == expected.nonzero().flatten().tolist()


def test_union_and_intersection_act_block_by_block() -> None:
    shared = BlockLayout.build(Local(2), 64, block=8)
    per_head = BlockLayout.build(Strided(3), 64, block=8, num_heads=3, allow_empty=True)
    assert torch.equal((shared | per_head).to_mask(), shared.to_mask() | per_head.to_mask())
    assert torch.equal((per_head & shared).to_mask(), shared.to_mask() & per_head.to_mask())


def test_slices_are_slices_of_the_mask_and_remember_their_place() -> None:
    layout = BlockLayout.build(Strided(3) | Local(2), 64, block=8, num_heads=4)
    part = layout.slice_heads(1, 3).slice_queries(2, 7).slice_keys(1, 5)
    assert torch.equal(part.to_mask(), layout.to_mask()[1:3, 2:7, 1:5])
    assert (part.first_query_block, part.first_key_block, part.shift) == (2, 1, 8)
    assert part.slice_queries(1, 3).first_query_block == 3


def test_density_counts_all_blocks_or_the_causal_triangle() -> None:
    layout = BlockLayout.build(Local(1), 32, block=8)
    assert layout.density() == pytest.approx(4 / 16)
    assert layout.density(causal=True) == pytest.approx(4 / 10)
    assert layout.slice_queries(2, 4).density(causal=True) == pytest.approx(2 / 7)
    assert BlockLayout.build(Dense(), 32, block=8, causal=False).density(causal=True) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_block_mask_and_back(causal: bool) -> None:
    layout = BlockLayout.build(Strided(3) | Local(2), 500, block=64, num_heads=2, causal=causal)
    block_mask = layout.to_block_mask(500, causal=causal)
    assert block_mask.shape == (1, 2, 500, 500)
    assert torch.equal(BlockLayout.from_block_mask(block_mask).to_mask(), layout.to_mask())
    if causal:  # only the diagonal needs a mask
        assert block_mask.kv_num_blocks.tolist() == [[[1] * 8] * 2]


def test_block_mask_of_torch_is_understood() -> None:
    theirs = create_block_mask(lambda b, h, q, k: q - k < 100, 1, 1, 512, 512, device="cpu", BLOCK_SIZE=64)
    assert torch.equal(
        BlockLayout.from_block_mask(theirs).to_mask()[0], torch.arange(8)[:, None] - torch.arange(8) <= 2
    )


def test_picture_has_a_panel_for_each_head() -> None:
    layout = BlockLayout.build(Strided(3) | Local(2), 64, block=8, num_heads=6)
    panels = [axes for axes in layout.plot(causal=True).axes if axes.images]
    assert [axes.get_title() for axes in panels] == [f"head {head}" for head in range(6)]
    assert torch.equal(torch.from_numpy(panels[4].images[0].get_array().data), layout.to_mask()[4])


def test_picture_of_a_slice_counts_blocks_of_the_whole() -> None:
    part = BlockLayout.build(Local(2), 64, block=8).slice_queries(4, 7).slice_keys(2, 8)
    (panel,) = part.plot(causal=True).axes
    assert panel.get_xlim() == (1.5, 7.5)
    assert panel.get_ylim() == (6.5, 3.5)
    assert torch.equal(torch.from_numpy(panel.images[0].get_array().data), part.to_mask()[0])


BLOCK = 4


def token_mask(layout: BlockLayout, batch: int, queries: int, keys: int, causal: bool, borders: list[int]) -> Tensor:
    """Which keys each query sees, token by token, the slow and obvious way: bool [B, H, S, S]."""
    mask = layout.to_mask().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None, :, :queries, :keys]
    query = torch.arange(queries) + layout.first_query_block * BLOCK
    key = torch.arange(keys) + layout.first_key_block * BLOCK
    mask = mask.repeat(batch, 1, 1, 1)
    if causal:
        mask &= query[:, None] >= key
    for sample in range(batch if borders else 0):
        skipped = 0 if borders[-1] == keys else sample * keys
        document_of = [
            torch.tensor([sum(b <= t + skipped for b in borders) for t in at.tolist()]) for at in (query, key)
        ]
        mask[sample] &= document_of[0][:, None] == document_of[1]
    return mask


def check_ranges(layout: BlockLayout, batch: int, queries: int, keys: int, causal: bool, borders: list[int]) -> None:
    cu_seqlens = torch.tensor(borders, dtype=torch.int32) if borders else None
    visible = layout.visibility(batch, queries, keys, causal=causal, cu_seqlens=cu_seqlens)
    mask = token_mask(layout, batch, queries, keys, causal, borders)
    places = (layout.num_query_blocks, layout.num_key_blocks)
    tokens = mask.new_zeros(*mask.shape[:2], places[0] * BLOCK, places[1] * BLOCK)
    tokens[..., :queries, :keys] = mask
    any_BHQK = tokens.view(*mask.shape[:2], places[0], BLOCK, places[1], BLOCK).any(-1).any(3)
    tokens[..., queries:, :] = True  # queries past the end need no mask: nothing of them is kept
    all_BHQK = tokens.view(*mask.shape[:2], places[0], BLOCK, places[1], BLOCK).all(-1).all(3)
    for lists, ranges, some, every in (
        (layout.rows, visible.row_ranges, any_BHQK, all_BHQK & any_BHQK),
        (layout.columns, visible.column_ranges, any_BHQK.mT, all_BHQK.mT & any_BHQK.mT),
    ):
        for sample in range(batch):
            for head in range(layout.num_heads):
                for line in range(lists.num_lines):
                    at = ranges.expand(batch, -1, -1, -1)[sample, head, line].tolist()
                    assert at == sorted(at)
                    listed = lists.indices[head]
                    partial = listed[at[FIRST] : at[FULL]].tolist() + listed[at[NOT_FULL] : at[END]].tolist()
                    full = listed[at[FULL] : at[NOT_FULL]].tolist()
                    assert full == every[sample, head, line].nonzero().flatten().tolist()
                    assert set(partial) >= set(some[sample, head, line].nonzero().flatten().tolist()) - set(full)


@given(masks, st.booleans(), st.integers(0, BLOCK - 1), st.lists(st.integers(0, 48), max_size=3), st.booleans())
@settings(max_examples=60)
def test_exactly_the_blocks_that_hide_something_are_partial(
    mask: Tensor, causal: bool, missing: int, inner: list[int], per_sample: bool
) -> None:
    n = min(mask.shape[1:])
    layout = BlockLayout.from_mask(mask[:, :n, :n], BLOCK)
    length = n * BLOCK - missing
    check_ranges(layout, 2, length, length, causal, [])
    total = 2 * length if per_sample else length
    borders = sorted({0, total, *(border % total for border in inner), *([length] if per_sample else [])})
    check_ranges(layout, 2, length, length, causal, borders)


@given(masks, st.booleans(), st.integers(0, BLOCK - 1))
@settings(max_examples=30)
def test_slices_hide_what_the_whole_hides(mask: Tensor, causal: bool, missing: int) -> None:
    n = min(mask.shape[1:])
    layout = BlockLayout.from_mask(mask[:, :n, :n], BLOCK)
    middle = n // 2
    length = n * BLOCK - missing
    check_ranges(layout.slice_queries(middle, n), 1, length - middle * BLOCK, length, causal, [])
    part = layout.slice_queries(middle, n).slice_keys(0, middle + 1)
    check_ranges(part, 1, length - middle * BLOCK, min(length, (middle + 1) * BLOCK), causal, [])


@pytest.mark.parametrize("value", [-1, 0, 1.5, 2.0, True, "2", None], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Local, "Local.width"),
        (Sink, "Sink.width"),
        (Strided, "Strided.stride"),
        (lambda value: Dilated(value, 2), "Dilated.width"),
        (lambda value: Dilated(2, value), "Dilated.dilation"),
        (Random, "Random.count"),
        (lambda value: BlockLayout.build(Local(1), value), "num_tokens"),
        (lambda value: BlockLayout.build(Local(1), 64, block=value), "block"),
        (lambda value: BlockLayout.from_mask(torch.ones(1, 1, 1).bool(), value), "block"),
    ],
    ids=lambda made: made if isinstance(made, str) else "",
)
def test_what_counts_blocks_is_a_positive_integer(make: Callable[[object], object], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))}: must be an integer of at least 1$"):
        make(value)


@pytest.mark.parametrize("value", [-1, 1.5, True, "0"], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Strided(2, value), "Strided.offset"),
        (lambda value: Random(1, value), "Random.seed"),
        (lambda value: Document((0, value, 64)), r"Document.cu_seqlens\[1\]"),
        (lambda value: BlockLayout.build(Local(1), 128).slice_keys(value, 2), "first of key blocks"),
    ],
    ids=lambda made: made if isinstance(made, str) else "",
)
def test_what_names_a_place_is_an_integer(make: Callable[[object], object], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))}: must be an integer of at least 0$"):
        make(value)


def test_integers_of_numpy_are_integers() -> None:
    assert seen(Local(np.int64(2)), 5) == [4, 5]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Random(1, 2**63), "Random.seed=9223372036854775808: must be below"),
        (lambda: Document(torch.tensor([0, 8])), r"is a Tensor: must be a tuple.* tuple\(cu_seqlens.tolist\(\)\)"),  # type: ignore[arg-type]
        (lambda: Document((0,)), "must start with 0 and ascend"),
        (lambda: Explicit([[True]]), "Explicit.blocks is a list: must be a bool tensor"),  # type: ignore[arg-type]
        (lambda: Local(2) | 1, r"pattern \| 1: the right side must be a pattern"),  # type: ignore[operator]
        (lambda: Local(2) & "sink", "pattern & 'sink': the right side must be a pattern"),  # type: ignore[operator]
        (lambda: Document((0, 8, 4)), "must start with 0 and ascend"),
        (lambda: Explicit(torch.zeros(3)), "must be bool"),
        (lambda: BlockLayout.build(Document((0, 8)), 9, block=4), "ends at 8 but the sequence has 9 tokens"),
        (lambda: BlockLayout.build(Explicit(torch.ones(2, 2).bool()), 9, block=4), r"must be \[3, 3\]"),
        (lambda: BlockLayout.build(Strided(2), 64, num_heads=2), r"query block 0 of head 1 sees no key"),
        (lambda: BlockLayout.build(Strided(2), 64), "pass num_heads"),
        (lambda: BlockLayout.build([Local(1)] * 3, 64, num_heads=2), "3 entries for num_heads=2"),
        (lambda: BlockLayout.build(Local(1), 0), "num_tokens=0"),
        (lambda: BlockLayout.build(Strided(2), 64, num_heads=0), "num_heads=0: must be an integer of at least 1"),
        (lambda: BlockLayout.build("dense", 64), "patterns='dense': must be a Pattern"),  # type: ignore[arg-type]
        (lambda: BlockLayout.build(Local(1), 64) | Sink(1), "lay that out with BlockLayout.build"),  # type: ignore[operator]
        (lambda: BlockLayout.from_mask([[True]]), "mask is a list: must be a bool tensor"),  # type: ignore[arg-type]
        (lambda: BlockLayout.from_mask(torch.ones(2, 2)), "must be bool"),
        (lambda: BlockLayout.from_block_mask(torch.ones(1, 2, 2)), "block_mask is a Tensor: must be FlexAttention's"),  # type: ignore[arg-type]
        (lambda: BlockLayout.build(Local(1), 64).slice_queries(0, 2), "query blocks 0 to 2 of 1"),
        (
            lambda: BlockLayout.build(Local(1), 64) | BlockLayout.build(Local(1), 128),
            "build both for the same sequence",
        ),
        (lambda: BlockLayout.build(Local(1), 64).to_block_mask(65), "there are 65 queries"),
    ],
)
def test_mistakes_are_named_with_what_would_do(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
