"""`key=value` on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.config import RunConfig, load_config

Mistakes = Callable[..., list[str]]

RUN = """\
name: tiny
model: {dim: 8, num_layers: 1, num_heads: 2}
sparsity:
  - {params: "*.ffn.*", method: prune, sparsity: 0.5, schedule: cubic}
optimizer: {schedule: wsd}
train:
  tokens: 4Ki
  batch_tokens: 1Ki
"""


@pytest.mark.parametrize(
    ("overrides", "read", "expected"),
    [
        (["train.tokens=2M"], lambda c: c.train.tokens, 2_000_000),
        (["train.tokens=64k"], lambda c: c.train.tokens, 64_000),
        (["optimizer.lr=6e-4"], lambda c: c.optimizer.lr, 6e-4),
        (["sparsity.0.sparsity=0.25"], lambda c: c.sparsity[0].sparsity, 0.25),
        (["sparsity=[]"], lambda c: c.sparsity, ()),
        (["sparsity.0.schedule.start=0.1"], lambda c: c.sparsity[0].schedule.model_dump()["start"], 0.1),
        (
            ["optimizer.schedule.warmup=0.3"],
            lambda c: (c.optimizer.schedule.kind, c.optimizer.schedule.warmup),
            ("wsd", 0.3),
        ),
        (["cluster.workers=4"], lambda c: c.cluster.workers, 4),
        (["train.batch_ramp.start_tokens=512"], lambda c: c.train.batch_ramp.start_tokens, 512),
        (["data.source={kind: text, paths: [a, b]}"], lambda c: c.data.source[0].paths, ("a", "b")),
        (
            ["data.source.kind=text", "data.source.paths=[a]"],
            lambda c: (c.data.source[0].kind, c.data.source[0].paths),
            ("text", ("a",)),
        ),
        (["data.source=text", "data.source.paths=[a]"], lambda c: c.data.source[0].paths, ("a",)),
        (["data.source={kind: text, paths: [a]}", "data.source.weight=2"], lambda c: c.data.source[0].weight, 2),
        (["data.source.0.kind=text", "data.source.0.paths=[a]"], lambda c: c.data.source[0].paths, ("a",)),
        (
            ["data.source=[python-stdlib, {kind: text, paths: [a]}]", "data.source.0.part=prose"],
            lambda c: [source.kind for source in c.data.source],
            ["python-stdlib", "text"],
        ),
        (["data.source.0=python-stdlib"], lambda c: c.data.source[0].part, "code"),
        (
            ["train.phases=[{name: b, tokens: 1Ki}]", "train.phases.0.data.source.part=prose"],
            lambda c: c.phases[1].data.source[0].part,
            "prose",
        ),
        (
            ["sparsity=[{method: static, sparsity: 0.5}]", "sparsity.0.params.0=a"],
            lambda c: c.sparsity[0].params,
            ("a",),
        ),
        (["name=no"], lambda c: (c.name, c.output), ("no", "runs/no")),
        (["output=a=b"], lambda c: c.output, "a=b"),
        (["train.phases=[{name: b, tokens: 1Ki}]", "train.phases.0.name=c"], lambda c: c.phases[1].name, "c"),
        (["optimizer.grad_clip="], lambda c: c.optimizer.grad_clip, None),
        (["seed=1", "seed=2"], lambda c: c.seed, 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_override_changes_one_thing(
    tmp_path: Path, overrides: list[str], read: Callable[[RunConfig], Any], expected: object
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)

    assert read(load_config(path, overrides)) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.tokens", "override train.tokens: expected key=value, for example train.tokens=2M"),
        ("=3", "override =3: expected key=value"),
        ("train..tokens=3", "override train..tokens=3: expected key=value"),
        ("train.tokens=[", "override train.tokens=[: the value is not valid YAML"),
        ("train.tokens={a: 1, a: 2}", "override train.tokens={a: 1, a: 2}: written twice"),
        ("train.tokens=2K", "override train.tokens=2K: unknown unit K; did you mean k or Ki?"),
        ("train.token=2M", "override train.token=2M: unknown key; did you mean tokens?"),
        ("lr=1", "override lr=1: unknown key; did you mean optimizer.lr?"),
        ("tran.tokens=1", "override tran.tokens=1: tran: unknown key; did you mean train?"),
        ("sparsity.1.sparsity=0.5", "override sparsity.1.sparsity=0.5: sparsity has no item 1; its last item is 0"),
        ("train.phases.0.name=a", "override train.phases.0.name=a: train.phases has no item 0; it is empty"),
        ("sparsity.sparsity=0.5", "sparsity is a list; write sparsity.0.sparsity for its first item"),
        ("data.source.1.kind=text", "override data.source.1.kind=text: data.source has no item 1; it is empty"),
        ("model.0=3", "override model.0=3: model is not a list and has no item 0"),
        ("name.first=a", "override name.first=a: name is a single value and has no keys"),
        ("optimizer.schedule.kind=cosin", "override optimizer.schedule.kind=cosin: expected one of cosine, linear"),
        ("sparsity.0.schedule={kind: cubic, initial: 0.9}", "sparsity.0.schedule.initial = 0.9: must not be above"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(mistakes: Mistakes, override: str, expected: str) -> None:
    lines = mistakes(RUN, override)

    assert len(lines) == 1
    assert lines[0].startswith(f"override {override}: ")
    assert expected in lines[0]


def test_a_list_of_sources_asks_for_the_number_of_one(mistakes: Mistakes) -> None:
    (line,) = mistakes(RUN, "data.source=[python-stdlib]", "data.source.part=prose")

    assert line.endswith("data.source is a list; write data.source.0.part for its first item")


def test_a_source_that_overrides_leave_half_done_is_blamed_on_them(mistakes: Mistakes) -> None:
    one = mistakes(RUN, "data.source.kind=text")
    first = mistakes(RUN, "data.source.0.kind=text")

    assert one == [
        "override data.source.kind=text: data.source.paths: missing (Files or globs (`**` included), "
        "relative to the current directory)"
    ]
    assert first == [
        "override data.source.0.kind=text: data.source.0.paths: missing (Files or globs (`**` included), "
        "relative to the current directory)"
    ]


def test_a_conflict_is_blamed_on_where_its_key_was_written(mistakes: Mistakes) -> None:
    assert mistakes(RUN, "model.dim=9") == ["bad.yaml:2: model.num_heads = 2: must divide dim=9; 1 and 3 do"]
    assert mistakes(RUN, "model.num_heads=3") == ["override model.num_heads=3: must divide dim=8; 2 and 4 do"]
