from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.config import RunConfig
from sparsetrain.training.phase_plan import PhasePlan, plan_phases

SEQ_LEN = 16


def plans(tokens: int, batch_samples: int, **train: object) -> list[PhasePlan]:
    config = {
        "name": "plan",
        "model": {"dim": 8, "num_layers": 1, "num_heads": 1},
        "data": {"seq_len": SEQ_LEN},
        "train": {"tokens": tokens, "batch_tokens": batch_samples * SEQ_LEN, **train},
    }
    return plan_phases(RunConfig.model_validate(config))


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    (plan,) = plans(tokens=1000, batch_samples=4)
    assert (plan.num_steps, plan.num_tokens) == (16, 1024)


def test_later_phases_begin_where_the_first_ends() -> None:
    first, second = plans(1024, 4, phases=[{"name": "tune", "tokens": 130}])
    assert (first.num_steps, second.first_step, second.num_steps, second.index) == (16, 16, 3, 1)


def test_a_ramp_grows_in_equal_increments() -> None:
    (plan,) = plans(64 * SEQ_LEN, 4, batch_ramp={"start_tokens": SEQ_LEN, "over": 0.3})
    sizes = [plan.samples_in_step(step) for step in range(plan.num_steps)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert set(sizes) == {1, 2, 3, 4}
    # 30 % of 64 samples in three sizes: 6.4 samples each, in whole steps
    assert [sizes.count(size) for size in (1, 2, 3)] == [6, 3, 2]


@given(
    tokens=st.integers(1, 20_000),
    factor=st.integers(1, 6),
    start=st.integers(1, 6),
    over=st.floats(0, 1),
)
def test_batches_lie_end_to_end_and_cover_the_tokens_asked_for(
    tokens: int, factor: int, start: int, over: float
) -> None:
    ramp = {"batch_ramp": {"start_tokens": start * SEQ_LEN, "over": over}} if factor > 1 else {}
    (plan,) = plans(tokens, factor * start, **ramp)
    at = 0
    for step in range(plan.num_steps):
        assert plan.first_sample(step) == at
        at += plan.samples_in_step(step)
    assert plan.num_tokens == at * SEQ_LEN >= tokens
    assert plan.num_tokens - tokens < plan.samples_in_step(plan.num_steps - 1) * SEQ_LEN + SEQ_LEN
    assert plan.tokens_per_step().tolist() == [plan.samples_in_step(s) * SEQ_LEN for s in range(plan.num_steps)]
