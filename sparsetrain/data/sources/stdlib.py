"""The running interpreter's own standard library: about 10 MB of real text that every machine already has."""

import ast
import io
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.config.data import PythonStdlib
from sparsetrain.data.sources.base import Document, FileSource, SourceFile, describe_file, open_binary
from sparsetrain.errors import DataError

_LEFT_OUT = {"idlelib", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class PythonStdlibSource(FileSource):
    """Modules of the standard library, or the docstrings in them; a module is a document in both.

    A document's identity is the module's path, so that a module held out of the code is held out of the prose too.

    Args:
        config: Which part to read.
        root: Folder of the library; default the running interpreter's.

    Raises:
        DataError: The interpreter comes without the library's source.
    """

    kind = "python-stdlib"

    def __init__(self, config: PythonStdlib, root: Path | None = None) -> None:
        root = root or Path(sysconfig.get_path("stdlib"))
        files = list(_modules(root))
        if not files:
            raise DataError(
                f"data.source=python-stdlib: {root} has no .py files (this Python ships its library without source); "
                "give text files instead: data.source={kind: text, paths: [...]}"
            )
        super().__init__(files)
        self._part = config.part
        self.label = f"python-stdlib ({config.part})"
        self.options = f"part={config.part}"

    @property
    def version(self) -> str:
        """Version of the interpreter."""
        return f"Python {platform.python_version()}"

    def documents(self) -> Iterator[Document]:
        """Read the modules in the order of their paths; one without docstrings has no prose."""
        for file in self.files:
            source = _read_module(file.path)
            text = source if self._part == "code" else _docstrings(source, file.path)
            yield Document(file.name, text, file.size)


def _modules(root: Path) -> Iterator[SourceFile]:
    """All modules but tests, IDLE, installed packages, and what the build of the interpreter generated."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_left_out(name)]
        paths += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return (describe_file(path, name) for name, path in named)


def _is_left_out(folder: str) -> bool:
    # config-3.x-platform/ and _sysconfigdata*.py spell out paths of the machine that built the interpreter.
    return (
        folder in _LEFT_OUT
        or folder.startswith("config-")
        or "test" in folder.split("_")
        or "tests" in folder.split("_")
    )


def _read_module(path: Path) -> str:
    with open_binary(path) as file:
        content = file.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding).replace("\r\n", "\n")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be decoded ({error})") from error


def _docstrings(source: str, path: Path) -> str:
    """All docstrings of a module in the order of its source, a blank line between them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the library itself
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"{path}: not valid Python, so its docstrings cannot be read ({error})") from error
    found = _in_source_order(tree)
    return "\n\n".join(text for node in found if (text := ast.get_docstring(node)))


def _in_source_order(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    if isinstance(node, _DOCUMENTED):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # no docstrings inside expressions
            yield from _in_source_order(child)
