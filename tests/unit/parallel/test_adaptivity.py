"""Settings are tried in turn, the fastest is kept, and looked for again when loads may have changed."""

from sparsetrain.parallel.fssdp.adaptivity import Trial


def run(trial: Trial, seconds: dict[int, float], steps: int) -> list[int]:
    """The setting of each step, where a step takes as long as its setting says."""
    used = []
    for _ in range(steps):
        used.append(trial.chosen)
        trial.observe(seconds[trial.chosen])
    return used


def test_each_setting_is_tried_and_the_fastest_is_kept() -> None:
    used = run(Trial((1, 2, 4), steps_each=3), {1: 5.0, 2: 3.0, 4: 4.0}, steps=12)

    assert used == [1, 1, 1, 2, 2, 2, 4, 4, 4, 2, 2, 2]


def test_the_first_step_of_a_setting_and_a_slow_one_among_others_do_not_count() -> None:
    trial = Trial((1, 2), steps_each=4)
    for cost in (9.0, 2.0, 2.0, 2.0, 0.1, 3.0, 1.0, 50.0):
        trial.observe(cost)

    assert trial.chosen == 2


def test_settings_are_tried_again_when_loads_may_have_changed() -> None:
    trial = Trial((1, 2), steps_each=2, again_after=8)
    assert run(trial, {1: 1.0, 2: 2.0}, steps=8)[-1] == 1

    assert run(trial, {1: 2.0, 2: 1.0}, steps=6) == [1, 1, 2, 2, 2, 2]


def test_a_single_setting_is_never_left() -> None:
    assert run(Trial((3,)), {3: 1.0}, steps=5) == [3] * 5
