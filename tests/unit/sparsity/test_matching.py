import pytest
import torch
from torch import nn

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.errors import ConfigError
from sparsetrain.sparsity import describe_parameters, match_rules


class Decoder(nn.Module):
    """Names as in Hugging Face models: nothing of ours in it."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm((2, 8)), "up_proj": nn.Linear(8, 16)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def static(*params: str, pattern: str = "unstructured") -> SparsityRule:
    return SparsityRule(params=params, method="static", sparsity=0.5, pattern=pattern)


def owned(*rules: SparsityRule, model: nn.Module | None = None) -> list[list[str]]:
    with torch.device("meta"):
        parameters = describe_parameters(Decoder() if model is None else model)
    return [[parameter.name for parameter in mine] for mine in match_rules(rules, parameters)]


def test_a_star_takes_matrices_and_leaves_embeddings_norms_biases_and_the_head() -> None:
    matrices = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("q_proj", "up_proj")]
    assert owned(static("*")) == [matrices]
    assert owned(static("*.weight")) == [matrices]
    assert owned(static("layers.*")) == [matrices]


def test_the_first_rule_that_matches_owns_and_weight_may_be_left_out() -> None:
    rules = [static("*.q_proj"), static("layers.1.*.weight"), static("*")]
    assert owned(*rules) == [
        ["layers.0.q_proj.weight", "layers.1.q_proj.weight"],
        ["layers.1.up_proj.weight"],
        ["layers.0.up_proj.weight"],
    ]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("embed_tokens", ["embed_tokens.weight"]),
        ("*.bias", [f"layers.{i}.{name}.bias" for i in range(2) for name in ("norm", "q_proj", "up_proj")]),
        ("*lm_head.weight", []),
        ("lm_head.weight", ["lm_head.weight"]),
        ("layers.0.norm", ["layers.0.norm.weight"]),
        ("*.norm", ["layers.0.norm.weight", "layers.1.norm.weight"]),
    ],
)
def test_what_is_dense_by_default_must_be_spelled_out(glob: str, names: list[str]) -> None:
    if names:
        assert owned(static(glob)) == [names]
    else:
        with pytest.raises(ConfigError, match="unless the glob's last part spells"):
            owned(static(glob))


def test_a_shared_weight_is_known_by_all_its_names() -> None:
    assert owned(static("lm_head"), model=Decoder(tied=True)) == [["embed_tokens.weight"]]
    assert "embed_tokens.weight" not in owned(static("*"), model=Decoder(tied=True))[0]


def test_bare_parameters_of_foreign_modules_match_by_their_own_names() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert owned(static("*.in_proj_weight"), static("*"), model=layer) == [
        ["self_attn.in_proj_weight"],
        ["linear1.weight", "linear2.weight", "self_attn.out_proj.weight"],
    ]


def test_wrappers_do_not_change_names() -> None:
    compiled = torch.compile(Decoder(), backend="eager")
    assert owned(static("layers.0.q_proj"), model=compiled) == [["layers.0.q_proj.weight"]]


def test_all_mistakes_are_reported_at_once_with_key_and_fix() -> None:
    rules = [static("*.q_prj", "*norm*"), static("*", pattern="block[3,8]"), static("layers.0.*")]
    with pytest.raises(ConfigError) as caught:
        match_rules(rules, describe_parameters(Decoder()), key="train.phases.0.sparsity")
    text = str(caught.value)
    assert "train.phases.0.sparsity.0.params.0 = '*.q_prj': matches no parameter; the nearest name is layers." in text
    assert "train.phases.0.sparsity.0.params.1 = '*norm*': matches only" in text  # with what to write instead:
    assert "unless the glob's last part spells theirs: '*.norm'" in text
    assert "train.phases.0.sparsity.1.pattern = block[3,8]: block[3,8] does not divide layers.0.q_proj.weight" in text
    assert "3 other weights" in text
    assert "train.phases.0.sparsity.2.params = " in text
    assert "belongs to an earlier rule" in text
