import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.split import document_hash, held_out

hash_lists = st.lists(st.integers(0, 2**64 - 1), max_size=50)
shares = st.floats(0, 1, exclude_max=True)


def split(hashes: list[int], share: float) -> list[bool]:
    return held_out(np.array(hashes, dtype=np.uint64), share).tolist()


def test_hash_is_the_same_on_every_machine() -> None:
    assert document_hash("asyncio/events.py") == 0xB875AF98336BED09
    assert document_hash("ü") != document_hash("u")


def test_share_of_documents_is_held_out() -> None:
    hashes = [document_hash(str(number)) for number in range(20_000)]

    assert 0.045 < np.mean(split(hashes, 0.05)) < 0.055


@given(hash_lists, shares)
def test_both_sides_have_a_document_if_there_are_two_different_ones(hashes: list[int], share: float) -> None:
    chosen = split(hashes, share)

    if share > 0 and len(set(hashes)) > 1:
        assert any(chosen)
        assert not all(chosen)
    else:
        assert not any(chosen)


@given(hash_lists, shares, st.randoms())
def test_order_of_documents_makes_no_difference(hashes: list[int], share: float, random: object) -> None:
    shuffled = list(hashes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen = dict(zip(hashes, split(hashes, share), strict=True))

    assert split(shuffled, share) == [chosen[value] for value in shuffled]


@given(hash_lists, shares, shares)
def test_larger_share_holds_out_the_same_documents_and_more(hashes: list[int], one: float, two: float) -> None:
    small, large = sorted((one, two))

    assert all(not less or more for less, more in zip(split(hashes, small), split(hashes, large), strict=True))


def test_copies_of_a_document_stay_together() -> None:
    assert split([5, 2**63, 5, 2**63], 0.001) == [True, False, True, False]
