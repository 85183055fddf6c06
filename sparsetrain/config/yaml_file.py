"""YAML -> plain Python values, and the line of each of them.

YAML 1.2's idea of a scalar: `true` and `false` are the only booleans (`no` is a name), `6e-4` is a number, and dates
are text. Anchors, aliases and merge keys work; tags that would build objects, and everything ambiguous, are errors.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sparsetrain.config.origin import FilePosition, KeyPath, Position
from sparsetrain.config.problem import Problem
from sparsetrain.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 20_000
"""A config has some hundred values; aliases of aliases can stand for billions of them."""

_TAG = "tag:yaml.org,2002:"
SCALARS: dict[str, tuple[re.Pattern[str], str]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^(?:[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
    "merge": (re.compile(r"^<<$"), "<"),
}
"""What a plain scalar of YAML 1.2's core schema looks like, and the characters that it may begin with."""


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2; it is asked for nodes only, and never builds an object."""


_Loader.yaml_implicit_resolvers = {}


def add_scalars(reader_or_writer: type[yaml.resolver.BaseResolver]) -> None:
    """Make a class of PyYAML's recognise YAML 1.2's plain scalars."""
    for kind, (pattern, first) in SCALARS.items():
        characters = ["" if character == "\0" else character for character in first]
        reader_or_writer.add_implicit_resolver(_TAG + kind, pattern, characters)


add_scalars(_Loader)


@dataclass
class ParsedYaml:
    """The values of a YAML text, where they were written, and what is wrong with it short of its syntax."""

    value: Any = None
    origins: dict[KeyPath, Position] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml_file(path: str | Path) -> ParsedYaml:
    """Read a YAML file.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or is not YAML.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the path of a YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist{_similar_files(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, which no config is; is it the right file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        raise ConfigError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> ParsedYaml:
    """Parse one YAML document.

    Args:
        text: The document.
        file: What to call it in messages.

    Raises:
        ConfigError: The text is not YAML; the message holds `file:line`.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_message(error, text, file)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{file}:{line}: character U+{error.character:04X} is not allowed in YAML") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply to be a config") from None
    builder = _Builder(file, text.splitlines())
    if root is not None:
        builder.parsed.origins[()] = FilePosition(file, root.start_mark.line + 1, 1, "")
        builder.parsed.value = builder.build(root, ())
    return builder.parsed


class _Builder:
    """Turns PyYAML's nodes into plain values, and notes where each key stands."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.parsed = ParsedYaml()
        self._file = file
        self._lines = lines
        self._num_values = 0
        self._open: list[Node] = []

    def build(self, node: Node, path: KeyPath) -> Any:
        """The value of a node; a problem is noted, and stands as None in the result."""
        self._count(node)
        if any(node is outer for outer in self._open):
            return self._problem(node, path, "this alias stands inside its own anchor")
        self._open.append(node)
        try:
            if isinstance(node, MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
            if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
                return self._sequence(node, path)
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values = {}
        for key, (key_node, value_node) in self._entries(node, path).items():
            self.parsed.origins[*path, key] = self._at(key_node)
            values[key] = self.build(value_node, (*path, key))
        return values

    def _entries(self, node: MappingNode, path: KeyPath) -> dict[str, tuple[Node, Node]]:
        """Keys and values of a mapping: its own, then those that `<<: *anchor` adds to them."""
        entries: dict[str, tuple[Node, Node]] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            self._count(key_node)
            key = key_node.value
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            elif key_node.tag != _TAG + "str":
                shown = key if isinstance(key_node, ScalarNode) and key else "this"
                self._problem(key_node, path, f"{shown} is not a name; quote it if it is meant to be a key")
            elif key in entries:
                line = entries[key][0].start_mark.line + 1
                self._problem(key_node, (*path, key), f"written twice, first in line {line}; keep one of the two")
            else:
                entries[key] = (key_node, value_node)
        for source in merged:
            if isinstance(source, MappingNode) and not any(source is outer for outer in self._open):
                entries = {**self._entries(source, path), **entries}
            else:
                self._problem(source, path, "<< takes an alias of a mapping, or a list of them")
        return entries

    def _count(self, node: Node) -> None:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise ConfigError(f"{self._at(node)}: anchors expand to more than {_MAX_VALUES} values; write them out")

    def _sequence(self, node: SequenceNode, path: KeyPath) -> list[Any]:
        values = []
        for index, child in enumerate(node.value):
            self.parsed.origins[*path, index] = self._at(child)
            values.append(self.build(child, (*path, index)))
        return values

    def _scalar(self, node: Node, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if not isinstance(node, ScalarNode) or kind not in (*SCALARS, "str"):
            shown = "!!" + kind if node.tag.startswith(_TAG) else node.tag
            return self._problem(node, path, f"the tag {shown} is not supported; write the value plainly")
        try:
            return scalar(kind, text)
        except ValueError:
            return self._problem(node, path, f"{text[:40]} is not a {kind}")

    def _problem(self, node: Node, path: KeyPath, message: str) -> None:
        problem = Problem(path, message, self._at(node))
        if problem not in self.parsed.problems:  # an anchor's problem is met again at each alias
            self.parsed.problems.append(problem)

    def _at(self, node: Node) -> FilePosition:
        start, end = node.start_mark, node.end_mark
        line = self._lines[start.line] if start.line < len(self._lines) else ""
        width = end.column - start.column if end.line == start.line else len(line) - start.column
        return FilePosition(self._file, start.line + 1, start.column + 1, line, max(width, 1))


def scalar(kind: str, text: str) -> Any:
    """The value of a YAML scalar.

    Raises:
        ValueError: The text is not of that kind (possible only where a tag such as `!!int` says what it is).
    """
    match kind:
        case "null":
            return None
        case "bool":
            return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse(text)
        case "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        case "float":
            return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))
        case _:
            return text


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _syntax_message(error: yaml.MarkedYAMLError, text: str, file: str) -> str:
    """PyYAML's syntax errors in plain words, for the mistakes that people make."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    source = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem or (source[: len(source) - len(source.lstrip())].count("\t")):
        what = "a tab where YAML wants spaces; indent with spaces"
    elif "undefined alias" in problem:
        what = f"{_quoted(problem, '*')} refers to an anchor that is not defined above it"
    elif "duplicate anchor" in problem or "duplicate anchor" in context:
        what = f"the anchor {_quoted(problem + context, '&')} is defined twice"
    elif "expected a single document" in (error.context or ""):
        what = "a second document begins here (---); a config is one document"
    elif "mapping values are not allowed" in problem:
        what = "a key is not expected here; is the line before it indented less, or is there a text with ': ' to quote?"
    elif "could not find expected ':'" in problem:
        line = error.context_mark.line + 1 if error.context_mark else line
        what = "a key without a colon; write key: value"
    elif "found character" in problem:
        what = f"{_quoted(problem, '')} cannot begin a value; put the value in quotes"
    else:
        what = f"not valid YAML: {problem}" + (f" {context}" if context else "")
    return f"{file}:{line}: {what}"


def _quoted(problem: str, sign: str) -> str:
    match = re.search(r"'([^']*)'", problem)
    return sign + match.group(1) if match else "it"


def _similar_files(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f", nor does the folder {path.parent}"
    there = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
