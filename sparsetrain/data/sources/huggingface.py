"""A dataset of the Hugging Face `datasets` library, which is imported only when a config asks for it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sparsetrain.config.data import HuggingFace
from sparsetrain.data.sources.base import Document
from sparsetrain.errors import DataError

_ROWS_AT_ONCE = 1000


class HuggingFaceSource:
    """A split of a dataset from the hub or a local folder; a row is a document, and its identity is its text.

    Raises:
        DataError: The library is missing, or the dataset, subset, split or field is.
    """

    kind = "huggingface"
    total_bytes: int | None = None
    notices: Sequence[str] = ()

    def __init__(self, config: HuggingFace) -> None:
        self._field = config.field
        self.label = "/".join(part for part in (config.name, config.subset, config.split) if part)
        self.options = f"field={config.field!r}"
        self._dataset = _load(config)
        self.version = str(self._dataset.info.version or "")
        if config.field not in self._dataset.column_names:
            raise DataError(
                f"data.source.field={config.field!r}: {self.label} has the columns "
                f"{', '.join(map(repr, self._dataset.column_names))}"
            )

    def documents(self) -> Iterator[Document]:
        """Read the rows."""
        first = 0
        for batch in self._dataset.select_columns([self._field]).iter(batch_size=_ROWS_AT_ONCE):
            for row, text in enumerate(batch[self._field], start=first):
                if not isinstance(text, str):
                    raise DataError(
                        f"{self.label}, row {row}: data.source.field={self._field!r} must be text and is "
                        f"{type(text).__name__}"
                    )
                yield Document(text, text, len(text.encode()))
            first += len(batch[self._field])

    def stamp(self) -> str | None:
        """None: the library's own fingerprint is as cheap."""
        return None

    def content_hash(self, on_bytes: Callable[[int], None]) -> str:
        """Hash of the library's fingerprint of the data and all that was done to it."""
        return hashlib.sha256(f"{self._dataset._fingerprint}".encode()).hexdigest()


def _load(config: HuggingFace) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source.kind=huggingface needs the datasets library: pip install 'sparsetrain[hf]'"
        ) from error
    try:
        dataset = datasets.load_dataset(config.name, config.subset, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data.source.name={config.name}, split={config.split}: cannot be loaded ({error})") from error
    return dataset
