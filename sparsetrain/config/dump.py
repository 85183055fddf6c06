"""A RunConfig -> YAML."""

import re
from typing import Any

import yaml

from sparsetrain.config.run import RunConfig
from sparsetrain.config.yaml_file import add_scalars


def dump_config(config: RunConfig) -> str:
    """Write a config as YAML, defaults included; `load_config` reads it back to an equal one."""
    values = _kind_first(config.model_dump(mode="json"))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def _kind_first(value: Any) -> Any:
    """Sections that are one of several kinds begin with which, as a person would write them."""
    if isinstance(value, list):
        return [_kind_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _kind_first(value[key]) for key in sorted(value, key=lambda key: key != "kind")}


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes wherever YAML 1.1 or 1.2 would take it for something else."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # PyYAML would write these line breaks of Unicode as they are and read back spaces; in quotes it escapes them
    style = '"' if re.search("[\x85\u2028\u2029]", value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


add_scalars(_Dumper)
_Dumper.add_representer(str, _text)
