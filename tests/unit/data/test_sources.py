import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.config.data import HuggingFace, JsonLines, PythonStdlib, TextFiles
from sparsetrain.data.sources import Source, open_source
from sparsetrain.data.sources.stdlib import PythonStdlibSource
from sparsetrain.errors import DataError


def texts_of(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


def text_source(*paths: Path | str, **options: Any) -> Source:
    return open_source(TextFiles(kind="text", paths=tuple(map(str, paths)), **options))


def jsonl_source(*paths: Path, **options: Any) -> Source:
    return open_source(JsonLines(kind="jsonl", paths=tuple(map(str, paths)), **options))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with everything in it that is left out."""
    root = tmp_path / "python3"
    files = {
        "os.py": '"""About os."""\ndef walk():\n  """Walk."""\nclass Path:\n  def go(self):\n    """Go."""\n',
        "json/__init__.py": "import x\n",
        "json/tool.py": '"""Tool."""\n',
        "latin.py": "# -*- coding: latin-1 -*-\n'é'\n",
        "test/test_os.py": "no",
        "ctypes/test/x.py": "no",
        "lib2to3/tests/x.py": "no",
        "unit_tests/x.py": "no",
        "idlelib/x.py": "no",
        "site-packages/numpy.py": "no",
        "config-3.11-x86/python-config.py": "no",
        "_sysconfigdata_x.py": "no",
        "__pycache__/os.cpython-311.pyc": "no",
        "LICENSE.txt": "no",
        "unittest/case.py": "case = 1\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="latin-1")
    return root


def test_stdlib_code_is_every_module_but_tests_and_generated_files(library: Path) -> None:
    source = PythonStdlibSource(PythonStdlib(), library)

    assert [document.identity for document in source.documents()] == [
        "json/__init__.py",
        "json/tool.py",
        "latin.py",
        "os.py",
        "unittest/case.py",
    ]
    assert texts_of(source)[2] == "# -*- coding: latin-1 -*-\n'é'\n"


def test_stdlib_prose_is_the_docstrings_of_the_same_documents(library: Path) -> None:
    documents = list(PythonStdlibSource(PythonStdlib(part="prose"), library).documents())

    assert [document.identity for document in documents][3] == "os.py"
    assert documents[3].text == "About os.\n\nWalk.\n\nGo."
    assert documents[0].text == ""


def test_stdlib_of_this_interpreter_is_about_10_megabytes() -> None:
    source = open_source(PythonStdlib())

    assert 5e6 < sum(document.num_bytes for document in source.documents()) < 20e6
    assert not any("/test" in document.identity for document in source.documents())
    assert source.version == f"Python {sys.version.split()[0]}"


def test_stdlib_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.py files"):
        PythonStdlibSource(PythonStdlib(), tmp_path)


def test_stdlib_module_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"'\xff'\n")

    with pytest.raises(DataError, match=r"bad\.py: cannot be decoded"):
        texts_of(PythonStdlibSource(PythonStdlib(), tmp_path))


def test_stdlib_module_that_is_not_python_has_no_prose(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("print 1\n")

    with pytest.raises(DataError, match=r"bad\.py: not valid Python"):
        texts_of(PythonStdlibSource(PythonStdlib(part="prose"), tmp_path))


def test_text_globs_are_sorted_recursive_and_never_repeat_a_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)

    assert texts_of(text_source(tmp_path / "b.txt", tmp_path / "**/*.txt")) == ["b.txt", "a.txt", "deep/c.txt"]


def test_text_path_with_brackets_is_a_path_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("found")

    assert texts_of(text_source(tmp_path / "a[1].txt")) == ["found"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.txt", r"data\.source\.paths: .*missing\.txt not found"),
        ("*.md", r"data\.source\.paths: .*\*\.md matches no file"),
        ("folder", r"folder is a folder; name its files"),
    ],
)
def test_text_paths_that_find_nothing(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(DataError, match=message):
        text_source(tmp_path / pattern)


def test_text_separator_divides_and_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<end>zwei: ü<end>three")

    assert texts_of(text_source(tmp_path / "a.txt", separator="<end>")) == ["one", "zwei: ü", "three"]


def test_text_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")

    assert texts_of(text_source(tmp_path / "a.txt")) == ["hello"]


@pytest.mark.parametrize(
    "text",
    ["para one.\n\npara two.\n\n" * 20, "windows\r\n\r\n" * 20, "line\n" * 50, "word " * 50, "東" * 100],
    ids=["paragraphs", "crlf", "lines", "words", "endless"],
)
def test_large_text_is_cut_without_losing_a_character(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    source = text_source(path, max_document_bytes=64)
    parts = texts_of(source)

    assert "".join(parts) == text
    assert all(len(part.encode()) <= 64 for part in parts)
    assert all(len(part.encode()) > 32 for part in parts[:-1])
    assert "cut at blank lines" in source.notices[0]
    assert str(path) in source.notices[0]
    assert sum(document.num_bytes for document in source.documents()) == source.total_bytes


def test_large_text_is_cut_at_blank_lines_where_it_has_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour\n\nfive\n")

    assert texts_of(text_source(tmp_path / "a.txt", max_document_bytes=14)) == [
        "one\ntwo\n\n",
        "three\nfour\n\n",
        "five\n",
    ]


def test_small_text_gives_no_notice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    source = text_source(tmp_path / "a.txt")

    assert texts_of(source) == ["one\n\ntwo"]
    assert source.notices == ()


def test_undecodable_bytes_name_the_file_and_the_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n--\nbad \xff\n")

    with pytest.raises(DataError, match=r"a\.txt: byte 12 \(0xff\) is not valid UTF-8.*iconv"):
        texts_of(text_source(tmp_path / "a.txt", separator="--"))


def test_jsonl_reads_plain_and_gzipped_alike(tmp_path: Path) -> None:
    content = "".join(json.dumps({"id": i, "body": f"text {i} ü"}) + "\n" for i in range(3)).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))

    plain = jsonl_source(tmp_path / "a.jsonl", field="body")
    zipped = jsonl_source(tmp_path / "b.jsonl.gz", field="body")
    assert texts_of(plain) == texts_of(zipped) == [f"text {i} ü" for i in range(3)]
    assert sum(document.num_bytes for document in zipped.documents()) == zipped.total_bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", r"a\.jsonl:2: empty line"),
        (b'{"text": ', r"a\.jsonl:2: not valid JSON"),
        (b'{"body": "x"}', r"a\.jsonl:2: data\.source\.field='text' is not among the line's keys: 'body'"),
        (b'{"text": 3}', r"a\.jsonl:2: 'text' must be text and is int"),
        (b'["text"]', r"a\.jsonl:2: expected a JSON object and found list"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: byte 27 \(0xff\) is not valid UTF-8"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: \\ud800 is half of a surrogate pair"),
    ],
    ids=["empty", "cut", "field", "type", "array", "utf8", "surrogate"],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n" + b'{"text": "fine"}\n')

    with pytest.raises(DataError, match=message):
        texts_of(jsonl_source(tmp_path / "a.jsonl"))


def test_gzip_cut_short_is_named(tmp_path: Path) -> None:
    content = gzip.compress(b'{"text": "a line"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-20])

    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the gzip file was cut short"):
        texts_of(jsonl_source(tmp_path / "a.jsonl.gz"))


def test_file_that_is_not_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "a line"}\n')

    with pytest.raises(DataError, match=r"a\.jsonl\.gz: not a valid gzip file"):
        texts_of(jsonl_source(tmp_path / "a.jsonl.gz"))


def test_content_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.txt").write_text("tuxt")
    hashes = [text_source(tmp_path / name).content_hash(lambda count: None) for name in ("a.txt", "b.txt", "c.txt")]

    assert hashes[0] == hashes[1] != hashes[2]


def test_huggingface_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(DataError, match=r"pip install 'sparsetrain\[hf\]'"):
        open_source(HuggingFace(kind="huggingface", name="wikitext"))


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[..., Path]) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    return write_jsonl(["first", "second ü"], name="set/train.jsonl").parent


@pytest.mark.slow  # importing datasets takes seconds
def test_huggingface_reads_a_local_folder(local_dataset: Path) -> None:
    source = open_source(HuggingFace(kind="huggingface", name=str(local_dataset)))

    assert texts_of(source) == ["first", "second ü"]
    assert len(source.content_hash(lambda count: None)) == 64
    with pytest.raises(DataError, match=r"data\.source\.field='body'.*'text'"):
        open_source(HuggingFace(kind="huggingface", name=str(local_dataset), field="body"))
    with pytest.raises(DataError, match="split=validation: cannot be loaded"):
        open_source(HuggingFace(kind="huggingface", name=str(local_dataset), split="validation"))
