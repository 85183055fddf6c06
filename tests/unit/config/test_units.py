import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.config import format_count, parse_count
from sparsetrain.config.units import divisors_near

UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@settings(deadline=None)
@given(number=st.integers(0, 10**9), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]))
def test_a_whole_number_with_a_unit_is_exact(number: int, unit: str, space: str) -> None:
    assert parse_count(f"{number}{space}{unit}") == number * UNITS[unit]


@settings(deadline=None)
@given(thousandths=st.integers(0, 10**9), unit=st.sampled_from(["k", "M", "B", "T"]))
def test_decimals_of_a_power_of_ten_are_exact(thousandths: int, unit: str) -> None:
    assert parse_count(f"{thousandths // 1000}.{thousandths % 1000:03d}{unit}") == thousandths * UNITS[unit] // 1000


@pytest.mark.parametrize(
    ("text", "count"), [("1_000", 1000), ("2e6", 2_000_000), (2e6, 2_000_000), ("1.5Ki", 1536), (7, 7), (".5k", 500)]
)
def test_other_ways_to_write_a_count(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "value", [True, None, [1], "", "k", "4 KM", "1.5", 0.5, "0.1Ki", float("nan"), float("inf"), "1e999", "-4M"]
)
def test_what_is_no_count_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected a|unknown unit"):
        parse_count(value)


@pytest.mark.parametrize(("count", "text"), [(512, "512"), (4_190_000, "4.19M"), (2_500_000_000, "2.5B"), (1000, "1k")])
def test_counts_are_written_for_people(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("whole", "wrong", "text"),
    [(12, 5, "4 and 6 do"), (7, 9, "7 does"), (7, 3, "1 and 7 do"), (10**12, 3, "2 and 4 do")],
)
def test_the_divisors_next_to_a_wrong_one_are_named(whole: int, wrong: int, text: str) -> None:
    assert divisors_near(whole, wrong) == text
