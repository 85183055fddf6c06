"""What a prepared corpus is made of, in lines for people."""

from sparsetrain.config.units import format_count
from sparsetrain.data.dataset import Dataset

_EXCERPT_TOKENS = 64


def describe(dataset: Dataset) -> list[str]:
    """Tokenizer, sources with their sizes and shares, samples, held-out text, and the beginning of the first sample."""
    tokenizer = dataset.tokenizer
    lines = [f"tokenizer  {tokenizer.name}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:8]}"]
    slots = dataset.order.slots
    for facts, share in zip(dataset.provenance["sources"], slots, strict=True):
        lines.append(_source_line(facts, share / sum(slots)))
    lines.append(
        f"training   {format_count(dataset.num_train_tokens)} tokens, {dataset.num_train_samples} samples of "
        f"{dataset.seq_len}"
    )
    lines.append(f"held out   {format_count(dataset.num_eval_tokens)} tokens, {dataset.num_eval_samples} samples")
    excerpt = tokenizer.decode(dataset.batch(0, 1).tokens[0, :_EXCERPT_TOKENS].tolist())
    lines.append(f"begins     {excerpt!r}")
    return lines + [f"note       {notice}" for notice in dataset.notices]


def _source_line(facts: dict[str, object], share: float) -> str:
    version = f", {facts['version']}" if facts["version"] else ""
    size = f", {format_count(int(str(facts['bytes'])))}B" if facts["bytes"] is not None else ""
    digest = f", sha256 {str(facts['sha256'])[:8]}" if facts["sha256"] else ""
    return (
        f"source     {facts['label']}{version}{digest}: {facts['documents']} documents{size}, "
        f"{facts['held_out_documents']} of them held out; {share:.1%} of the batches"
    )
