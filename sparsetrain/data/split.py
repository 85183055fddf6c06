"""Which documents are held out for evaluation: a function of the document alone, so of no seed, phase or file order."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def document_hash(identity: str) -> int:
    """64 bits that the split goes by.

    Args:
        identity: Name of a document that keeps its name (a module of the standard library), else its whole text, so
            that copies of a document all land on one side.
    """
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def held_out(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Choose the documents of a source that are kept out of training.

    Those whose hash lies in the lowest `share` of all 64-bit numbers; where that is none of them, the ones with the
    smallest hash, and where it is all of them, all but the ones with the largest. So a larger share holds out the same
    documents and more, and both sides have a document if the source has two different ones.

    Args:
        hashes: [num_documents] uint64.
        share: `data.holdout`, 0 <= share < 1.

    Returns:
        [num_documents] bool, true for held-out documents.
    """
    if share == 0 or hashes.size == 0 or hashes.min() == hashes.max():
        return np.zeros(hashes.size, dtype=np.bool_)
    threshold = np.uint64(int(share * 2**64))
    threshold = np.clip(threshold, hashes.min() + np.uint64(1), hashes.max())
    return np.asarray(hashes < threshold)
