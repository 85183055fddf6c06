"""Where text comes from: a file for each kind of source, behind one small protocol."""

from sparsetrain.config import data as schema
from sparsetrain.data.sources.base import Document, Source
from sparsetrain.data.sources.huggingface import HuggingFaceSource
from sparsetrain.data.sources.jsonl import JsonLinesSource
from sparsetrain.data.sources.stdlib import PythonStdlibSource
from sparsetrain.data.sources.text import TextFilesSource

__all__ = ["Document", "Source", "open_source"]

TextSource = schema.PythonStdlib | schema.TextFiles | schema.JsonLines | schema.HuggingFace


def open_source(config: TextSource) -> Source:
    """The source that a section of the config describes.

    Raises:
        DataError: It has no files, or a library that it needs is missing.
    """
    match config:
        case schema.PythonStdlib():
            return PythonStdlibSource(config)
        case schema.TextFiles():
            return TextFilesSource(config)
        case schema.JsonLines():
            return JsonLinesSource(config)
        case schema.HuggingFace():
            return HuggingFaceSource(config)
