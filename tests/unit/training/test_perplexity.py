import math

import pytest

from sparsetrain.training.evaluation import EvalResult
from sparsetrain.training.events import EvalDone
from sparsetrain.training.perplexity import perplexity
from sparsetrain.training.progress_state import describe_evaluation


def test_perplexity_is_e_to_the_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert math.isnan(perplexity(math.nan))


def test_loss_of_a_run_that_diverged_has_an_infinite_perplexity_everywhere() -> None:
    event = EvalDone("main", 3, "end", 1000.0, 1442.7, 100)
    assert perplexity(1000.0) == event.perplexity == EvalResult(1000.0, 1442.7, 100).perplexity == math.inf
    assert describe_evaluation(event) == "1442.700 bits/byte · loss 1000.000 · perplexity –"
