"""Files that are not YAML, or not what a person thinks they are."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetrain.config import load_config
from sparsetrain.config.origin import FilePosition
from sparsetrain.config.yaml_file import parse_yaml
from sparsetrain.errors import ConfigError

Mistakes = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("6.0E+4", 6e4),
        (".5", 0.5),
        ("-1.", -1.0),
        ("1e5", 1e5),
        ("-.inf", -math.inf),
        ("12", 12),
        ("-3", -3),
        ("1_000", 1000),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("off", "off"),
        ("YES", "YES"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("16Ki", "16Ki"),
        ("1_", "1_"),
        ("e5", "e5"),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("!!int '12'", 12),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}", "file")

    assert not parsed.problems
    assert parsed.value == {"key": value}
    assert type(parsed.value["key"]) is type(value)


def test_every_key_knows_its_line_and_column() -> None:
    parsed = parse_yaml("a:\n  - b: 1\n    c: {d: 2}\n  - 3\n", "file")

    places = {
        path: (where.line, where.column) for path, where in parsed.origins.items() if isinstance(where, FilePosition)
    }
    assert places == {
        (): (1, 1),
        ("a",): (1, 1),
        ("a", 0): (2, 5),
        ("a", 0, "b"): (2, 5),
        ("a", 0, "c"): (3, 5),
        ("a", 0, "c", "d"): (3, 9),
        ("a", 1): (4, 5),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("name: a\n\tseed: 1\n", "bad.yaml:2: a tab where YAML wants spaces; indent with spaces", id="tab"),
        pytest.param("model:\n\tdim: 1\n", "bad.yaml:2: a tab where YAML wants spaces", id="tab-first"),
        pytest.param("name: *x\n", "bad.yaml:1: *x refers to an anchor that is not defined above it", id="no-anchor"),
        pytest.param("name: a\n---\nname: b\n", "bad.yaml:2: a second document begins here (---)", id="two-documents"),
        pytest.param("name: a\nmodel: b: c\n", "bad.yaml:2: a key is not expected here", id="key-after-key"),
        pytest.param("name: a\nmodel\nseed: 1\n", "bad.yaml:2: a key without a colon; write key: value", id="no-colon"),
        pytest.param("name: [a\nseed: 1\n", "bad.yaml:2: not valid YAML", id="bracket-left-open"),
        pytest.param("name: @a\n", "bad.yaml:1: @ cannot begin a value; put the value in quotes", id="reserved"),
        pytest.param('name: "a\n', "not valid YAML", id="quote-left-open"),
        pytest.param("", "bad.yaml is empty; a run needs at least name, model and train", id="empty"),
        pytest.param("# nothing\n", "bad.yaml is empty", id="only-comments"),
        pytest.param("- a\n", "bad.yaml:1: expected keys with values", id="list"),
        pytest.param("demo\n", "bad.yaml:1: expected keys with values", id="text"),
        pytest.param(b"name: a\nseed: \xff\n", "bad.yaml:2: byte 0xff is not UTF-8", id="not-utf-8"),
        pytest.param("name: a\x00\n", "bad.yaml:1: character U+0000 is not allowed in YAML", id="null-character"),
        pytest.param("[" * 3000, "bad.yaml: nested too deeply", id="deep"),
        pytest.param(b"#" * (1 << 20) + b"\n#", "bad.yaml is larger than 1 MiB", id="huge"),
    ],
)
def test_what_is_not_yaml_is_one_message_with_its_line(mistakes: Mistakes, text: str, expected: str) -> None:
    (message,) = mistakes(text)

    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "name: a\nname: b\n", "bad.yaml:2: name: written twice, first in line 1; keep one of the two", id="twice"
        ),
        pytest.param(
            "model:\n  dim: 1\n  dim: 2\n", "bad.yaml:3: model.dim: written twice, first in line 2", id="nested-twice"
        ),
        pytest.param("1: a\n", "bad.yaml:1: 1 is not a name; quote it if it is meant to be a key", id="number-key"),
        pytest.param("[a]: b\n", "bad.yaml:1: this is not a name", id="list-key"),
        pytest.param(
            "name: !!python/object:os.system a\n",
            "name: the tag !!python/object:os.system is not supported",
            id="object",
        ),
        pytest.param("name: !include a.yaml\n", "name: the tag !include is not supported", id="own-tag"),
        pytest.param("seed: !!int abc\n", "seed: abc is not a int", id="wrong-tag"),
        pytest.param("model: &m {dim: 1, inner: *m}\n", "this alias stands inside its own anchor", id="endless"),
        pytest.param("model: &m\n  <<: *m\n", "<< takes an alias of a mapping", id="endless-merge"),
        pytest.param("model: {<<: 3}\n", "<< takes an alias of a mapping, or a list of them", id="merge-number"),
    ],
)
def test_what_is_yaml_but_ambiguous_is_told_with_everything_else(mistakes: Mistakes, text: str, expected: str) -> None:
    assert any(expected in line for line in mistakes(text))


def test_aliases_cannot_expand_without_end(mistakes: Mistakes) -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12))

    (message,) = mistakes(f"l0: &l0 [a]\n{levels}\n")

    assert "anchors expand to more than 20000 values" in message


def test_merges_cannot_expand_without_end(mistakes: Mistakes) -> None:
    levels = "\n".join(f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 10)}]}}" for n in range(1, 12))

    (message,) = mistakes(f"l0: &l0 {{a: 1}}\n{levels}\n")

    assert "anchors expand to more than 20000 values" in message


def test_anchors_aliases_and_merges_work() -> None:
    parsed = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 4, x: 9}]}\nd: *a\n", "file")

    assert not parsed.problems
    assert parsed.value == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2, "z": 4},
        "d": {"x": 1, "y": 2},
    }
    assert str(parsed.origins["b", "x"]) == "file:1"
    assert str(parsed.origins["b", "y"]) == "file:2"


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfname: a\r\nmodel: {dim: 8, num_layers: 1, num_heads: 2}\r\n"
        b"train: {tokens: 1Ki, batch_tokens: 1Ki}\r\n"
    )

    assert load_config(path).name == "a"


def test_a_missing_file_names_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").touch()

    with pytest.raises(ConfigError, match=r"demo\.yml does not exist; did you mean .*demo\.yaml\?"):
        load_config(tmp_path / "demo.yml")
    with pytest.raises(ConfigError, match="does not exist, nor does the folder"):
        load_config(tmp_path / "nowhere" / "demo.yaml")


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the path of a YAML file"):
        load_config(tmp_path)
