"""A config as YAML, and every YAML that comes with the project."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsetrain.config import RunConfig, dump_config, load_config
from sparsetrain.config.yaml_file import parse_yaml

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))

unit_interval = st.floats(0, 1, allow_subnormal=False)
schedules: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(
        lambda start, length, every: {"kind": "cubic", "start": start, "end": start + length, "every_steps": every},
        st.floats(0, 0.4),
        st.floats(0.01, 0.5),
        st.integers(1, 10**6),
    ),
    st.just({"kind": "stepwise", "steps": [[0.1, 0.2], [0.5, 0.5]]}),
)
rules = st.fixed_dictionaries(
    {
        "params": st.lists(st.text(min_size=1), min_size=1, max_size=2),
        "method": st.just("prune"),
        "sparsity": st.just(0.5),
        "schedule": schedules,
        "pattern": st.sampled_from(["unstructured", "block[16,1]"]),
        "distribution": st.sampled_from(["uniform", {"kind": "global", "floor": 0.1}, "erk"]),
        "criterion": st.sampled_from([None, "random", "magnitude"]),
    }
)
sources = st.one_of(
    st.builds(lambda text: {"kind": "text", "paths": [text], "separator": text}, st.text(min_size=1)),
    st.builds(lambda weight: {"kind": "python-stdlib", "weight": weight}, st.floats(1e-300, 1e300)),
)
runs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(
            ["no", "1e5", "6e-4", "0o17", "0x1F", "null", "-", "true", "1_0", "017", "12", "a.b-c_"]
        ),
        "seed": st.integers(0, 2**63),
        "model": st.just({"dim": 8, "num_layers": 1, "num_heads": 2}),
        "sparsity": st.lists(rules, max_size=2),
        "data": st.fixed_dictionaries({"source": st.lists(sources, min_size=1, max_size=3), "cache": st.text()}),
        "optimizer": st.fixed_dictionaries(
            {"lr": st.floats(1e-300, 1e300), "grad_clip": st.none() | st.floats(1e-9, 1e9), "eps": st.floats(1e-30, 1)}
        ),
        "train": st.fixed_dictionaries(
            {
                "tokens": st.integers(1, 10**30),
                "batch_tokens": st.integers(1, 10**6).map(lambda samples: 256 * samples),
                "phases": st.just([])
                | st.lists(
                    st.fixed_dictionaries(
                        {"name": st.just("b"), "tokens": st.just("2k"), "sparsity": st.lists(rules, max_size=1)}
                    ),
                    max_size=1,
                ),
            }
        ),
        "output": st.text().filter(str.strip),
    }
)


@given(raw=runs)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_dumped_config_loads_as_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate(raw)
    path = tmp_path / "dump.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    assert load_config(path) == config


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_yaml_reads_back_whatever_the_dumper_quotes(value: object) -> None:
    from sparsetrain.config.dump import _Dumper

    parsed = parse_yaml(yaml.dump({"key": value}, Dumper=_Dumper, allow_unicode=True), "file")

    assert not parsed.problems
    assert parsed.value == {"key": value}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")

    assert config.name == path.stem.replace("_", "-")
    assert load_config(copy) == config


def test_the_project_has_configs() -> None:
    mixtures = {"moe_ep_tiny.yaml", "moe_fssdp_tiny.yaml", "moe_fssdp_8x7b.yaml"}
    assert {"demo.yaml", "quick.yaml", *mixtures} <= {path.name for path in CONFIGS}


def test_other_yaml_readers_agree_about_text(smallest: Path) -> None:
    """YAML 1.1 takes `no` and `on` for booleans; the dump quotes them, so that outside tools read the same."""
    config = load_config(smallest, ["name=no", "output=on"])

    assert yaml.safe_load(dump_config(config))["name"] == "no"
    assert yaml.safe_load(dump_config(config))["output"] == "on"
