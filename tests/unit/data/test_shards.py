import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsetrain.data.shards import ShardWriter, TokenShard, check_vocabulary, shard_dtype
from sparsetrain.errors import DataError

WriteShard = Callable[..., Path]


def test_bytes_on_disk_are_those_of_the_format(write_shard: WriteShard) -> None:
    prefix = write_shard([[1, 2, 256], [513]])

    assert prefix.with_suffix(".bin").read_bytes() == bytes.fromhex("0100 0200 0001 0102")
    assert prefix.with_suffix(".idx").read_bytes() == bytes.fromhex(
        "4d4d494449445800 00"  # MMIDIDX, two zeros
        "0100000000000000"  # version 1
        "08"  # uint16
        "0200000000000000"  # two sequences
        "0300000000000000"  # three document entries
        "03000000 01000000"  # lengths
        "0000000000000000 0600000000000000"  # byte offsets
        "0000000000000000 0100000000000000 0200000000000000"  # documents
    )


@pytest.mark.parametrize("dtype", ["<u1", "<i1", "<i2", "<i4", "<i8", "<u2"])
def test_documents_read_back_in_every_dtype(write_shard: WriteShard, dtype: str) -> None:
    shard = TokenShard(write_shard([[5, 6, 7], [], [8]], dtype=dtype))

    assert shard.tokens.tolist() == [5, 6, 7, 8]
    assert shard.tokens.dtype == np.dtype(dtype)
    assert shard.document_offsets().tolist() == [0, 3, 3, 4]


def test_vocabulary_decides_the_dtype_as_megatron_does() -> None:
    assert shard_dtype(65499) == np.dtype("<u2")
    assert shard_dtype(65500) == np.dtype("<i4")


def test_a_prefix_may_have_dots(write_shard: WriteShard) -> None:
    prefix = write_shard([[1]], name="corpus.v2.1")

    assert (prefix.parent / "corpus.v2.1.idx").exists()
    assert TokenShard(prefix).num_documents == 1


def test_document_starts_lie_inside_the_range_only(write_shard: WriteShard) -> None:
    shard = TokenShard(write_shard([[0] * 3, [0] * 2, [0] * 4]))  # documents begin at 0, 3, 5

    assert shard.document_starts(0, 9).tolist() == [3, 5]
    assert shard.document_starts(3, 5).tolist() == []
    assert shard.document_starts(2, 6).tolist() == [1, 3]


def _write_index(prefix: Path, lengths: list[int], documents: list[int], *, code: int = 8, modes: bytes = b"") -> None:
    pointers = np.cumsum([0, *lengths[:-1]]) * 2
    prefix.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(lengths), len(documents))
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.array(documents, "<i8").tobytes()
        + modes
    )


@pytest.mark.parametrize("modes", [b"", b"\x00\x01\x00"], ids=["text", "multimodal"])
def test_documents_of_several_sequences(tmp_path: Path, modes: bytes) -> None:
    prefix = tmp_path / "shard"
    prefix.with_suffix(".bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    _write_index(prefix, [2, 1, 3], [0, 2, 3], modes=modes)
    shard = TokenShard(prefix)

    assert shard.num_documents == 2
    assert shard.document_offsets().tolist() == [0, 3, 6]
    assert shard.document_starts(0, 6).tolist() == [3]


def test_shard_cut_short_names_file_and_sizes(write_shard: WriteShard) -> None:
    prefix = write_shard([[1, 2, 3, 4]])
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-3])

    with pytest.raises(DataError, match=r"shard\.bin: expected 8 bytes \(4 tokens of 2 bytes.*found 5"):
        TokenShard(prefix)


def test_bin_longer_than_the_index_says_is_an_error(write_shard: WriteShard) -> None:
    prefix = write_shard([[1, 2]])
    with open(prefix.with_suffix(".bin"), "ab") as file:
        file.write(b"\0\0")

    with pytest.raises(DataError, match=r"expected 4 bytes.*found 6.*do not belong"):
        TokenShard(prefix)


@pytest.mark.parametrize("size", [20, 60])
def test_index_cut_short_names_file_and_sizes(write_shard: WriteShard, size: int) -> None:
    prefix = write_shard([[1, 2], [3]])
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(DataError, match=rf"shard\.idx: expected .* and found {size}; the file was cut short"):
        TokenShard(prefix)


@pytest.mark.parametrize(
    ("code", "message"), [(9, "unknown dtype code 9"), (7, "dtype code 7 is float32, and tokens are integers")]
)
def test_dtype_code_that_cannot_be_tokens(tmp_path: Path, code: int, message: str) -> None:
    prefix = tmp_path / "shard"
    prefix.with_suffix(".bin").write_bytes(b"\0\0")
    _write_index(prefix, [1], [0, 1], code=code)

    with pytest.raises(DataError, match=message):
        TokenShard(prefix)


@pytest.mark.parametrize("documents", [[0, 1], [1, 2], [0, 3, 2], []], ids=["short", "late", "falling", "none"])
def test_damaged_document_index(tmp_path: Path, documents: list[int]) -> None:
    prefix = tmp_path / "shard"
    prefix.with_suffix(".bin").write_bytes(b"\0" * 4)
    _write_index(prefix, [1, 1], documents)

    with pytest.raises(DataError, match="must rise from 0 to the 2 sequences"):
        TokenShard(prefix)


def test_sequences_that_overlap_are_damage(write_shard: WriteShard) -> None:
    prefix = write_shard([[1, 2], [3, 4]])
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[34 + 8 + 8] = 2  # the second sequence's byte offset, 4
    path.write_bytes(content)

    with pytest.raises(DataError, match="do not follow one another"):
        TokenShard(prefix)


def test_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + b"\0" * 100)

    with pytest.raises(DataError, match="not a Megatron index"):
        TokenShard(tmp_path / "old")


def test_missing_files_are_named(tmp_path: Path, write_shard: WriteShard) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx: not found"):
        TokenShard(tmp_path / "nowhere")
    prefix = write_shard([[1]])
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"shard\.bin: not found, though shard\.idx is there"):
        TokenShard(prefix)


@pytest.mark.parametrize("foreign", [300, -1])
def test_token_outside_the_vocabulary_is_located(write_shard: WriteShard, foreign: int) -> None:
    shard = TokenShard(write_shard([[1]]))

    check_vocabulary(shard, np.array([0, 256]), 0, 257)
    with pytest.raises(DataError, match=rf"shard\.bin: token number 12 is {foreign}.*0 to 256"):
        check_vocabulary(shard, np.array([1, 2, foreign]), 10, 257)


def test_no_index_appears_when_writing_fails(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "shard", np.dtype("<u2")) as writer:
            writer.add_document(np.array([1]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert not (tmp_path / "shard.idx").exists()


@pytest.mark.slow  # importing Megatron takes several seconds
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path, dtype: type[np.number]) -> None:  # type: ignore[type-arg]
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    documents = [[1, 2, 3], [4], [5, 6]]

    with ShardWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    theirs = indexed.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1])  # a document of two sequences
    for document in documents[1:]:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    shard = TokenShard(tmp_path / "theirs")
    assert shard.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert shard.document_offsets().tolist() == [0, 3, 4, 6]
