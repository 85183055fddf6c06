"""Block-sparse attention on a CPU: rows with equally many visible blocks, as batched matrix products.

A row is a block of queries of one head, or of all heads that share key/value head and layout. Rows are sorted by the
number of their visible blocks; of equal ones, as many as fit the caches are computed together: their blocks of keys and
values are gathered side by side, so that a row's scores are one matrix, and the backward pass adds the gradients of
gathered blocks to their places in a fixed order. Probabilities are not kept but computed again.

Precision. Products round their result to the dtype of their arguments, and a score of 40 rounded to bfloat16 is off by
1/8. So for dtypes narrower than float32 the forward pass multiplies queries and keys in float32. The backward pass,
which knows the log-sum-exp, has a level subtracted inside the product, so that scores that count are near 0 when
rounded: the log-sum-exp less ½ log P, halfway between the scores of a key that takes all and of P that share alike.
That level is rounded, too: in bfloat16 by 1/512 of it, and in float16 it must not be above 65504.

Memory. No tensor has S·T entries. Beside the arguments, with X the bytes of q (or of k, if that is larger) and e those
of an element: forward at most 6 X + 6 MiB, backward (9 + 8/e) X + 12 MiB, as dk and dv are summed in float32; and about
40 bytes for each visible block. The MiB are what is computed together: 1 MiB of scores, or one row if that is more.

Shapes: B samples, S queries, T keys, H query heads, K key/value heads, D head dim; R rows in one product, M queries of
a row (of all its heads), P keys in its visible blocks.
"""

from math import log

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.block_sparse_attention.cpu_rows import AllRows, Rows, Scratch, from_blocks, to_blocks
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.precision import as_written


def unsupported(q_BSHD: Tensor, block: int) -> str | None:
    """See `implementations.Support`."""
    return None if q_BSHD.is_cpu else f"q is on {q_BSHD.device}; move it to the CPU, or pass implementation=None"


def forward(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """See `implementations.Forward`."""
    wide = torch.promote_types(q_BSHD.dtype, torch.float32)
    all_rows = AllRows(q_BSHD, k_BTKD, visible, score_bytes=wide.itemsize)
    with as_written(q_BSHD.device):
        q = all_rows.sort(q_BSHD)
        k, v = (to_blocks(x, x.shape[2], visible.block) for x in (k_BTKD, v_BTKD))
        out = new_result(q, *q.shape).zero_()
        highest, its_p = (q.new_full(q.shape[:2], value, dtype=wide) for value in (float("-inf"), 1.0))
        narrow, scratch = Scratch(q.dtype), Scratch(wide)
        for rows in all_rows:
            at = rows.slice
            gathered = narrow("gathered", len(rows.gathered), *k.shape[1:])
            q_RMD, k_RPD = scratch.cast("q", q[at]), scratch.cast("k", rows.gather(k, gathered))
            scores = _scores(q_RMD, k_RPD, rows, scale, scratch)
            torch.amax(scores, -1, out=highest[at])
            p = _softmax(scores, highest[at], rows, scratch)
            torch.amax(p, -1, out=its_p[at])
            torch.bmm(narrow.cast("p", p), rows.gather(v, gathered), out=out[at])
        lse = torch.where(highest.isneginf(), highest, highest - its_p.log())  # the probability is 1 / denominator
    lse_BHS = all_rows.unsort(lse.unsqueeze(-1), q_BSHD[..., :1]).squeeze(-1).mT.contiguous()
    return all_rows.unsort(out, q_BSHD), lse_BHS


def backward(
    dout_BSHD: Tensor,
    dlse_BHS: Tensor | None,
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    out_BSHD: Tensor,
    lse_BHS: Tensor,
    visible: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `implementations.Backward`."""
    all_rows = AllRows(q_BSHD, k_BTKD, visible, score_bytes=q_BSHD.element_size())
    with as_written(q_BSHD.device):
        q, dout = (all_rows.sort(x) for x in (q_BSHD, dout_BSHD))
        lse = all_rows.sort(lse_BHS.mT.unsqueeze(-1), fill=float("-inf"))
        dlse = None if dlse_BHS is None else all_rows.sort(dlse_BHS.mT.unsqueeze(-1)).to(q.dtype)
        k, v = (to_blocks(x, x.shape[2], visible.block) for x in (k_BTKD, v_BTKD))
        dq = new_result(q, *q.shape).zero_()
        wide = torch.promote_types(k.dtype, torch.float32)
        level = None if q.dtype == wide else lse.masked_fill(lse.isneginf(), 0.0)
        dk, dv = (new_result(k, *k.shape, dtype=wide).zero_() for _ in range(2))
        scratch = Scratch(q.dtype)
        for rows in all_rows:
            at, gathered_shape = rows.slice, (len(rows.gathered), *k.shape[1:])
            k_RPD, v_RPD = rows.gather(k, scratch("k", *gathered_shape)), rows.gather(v, scratch("v", *gathered_shape))
            level_RM1 = None if level is None else level[at] - 0.5 * log(k_RPD.shape[1])
            scores = _scores(q[at], k_RPD, rows, scale, scratch, level_RM1)
            p = _softmax(scores, lse[at].squeeze(-1), rows, scratch)
            dv_RPD = torch.bmm(p.mT, dout[at], out=scratch("dv, then dk", *v_RPD.shape))
            rows.add_to(dv, dv_RPD, scratch)
            dp = torch.bmm(dout[at], v_RPD.mT, out=scores)
            dscores = scratch("dscores", *scores.shape)
            torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dscores)
            if dlse is not None:
                dscores.addcmul_(p, dlse[at])
            _product(dscores, k_RPD, scale, out=dq[at])
            rows.add_to(dk, _product(dscores.mT, q[at], scale, out=dv_RPD), scratch)
    dk_BTKD, dv_BTKD = (from_blocks(d.to(k.dtype), k_BTKD, k_BTKD.shape[2]) for d in (dk, dv))
    return all_rows.unsort(dq, q_BSHD), dk_BTKD, dv_BTKD


def _scores(
    q_RMD: Tensor, k_RPD: Tensor, rows: Rows, scale: float, scratch: Scratch, level_RM1: Tensor | None = None
) -> Tensor:
    """[R, M, P], −∞ where hidden; of each query its level is subtracted before they are rounded."""
    scores = scratch("scores", *q_RMD.shape[:2], k_RPD.shape[1])
    if level_RM1 is None:
        _product(q_RMD, k_RPD.mT, scale, out=scores)
    else:
        scores.copy_(-level_RM1.to(scores.dtype)).baddbmm_(q_RMD, k_RPD.mT, alpha=scale)
    rows.hide(scores)
    return scores


def _softmax(scores: Tensor, peak_RM: Tensor, rows: Rows, scratch: Scratch) -> Tensor:
    """[R, M, P]; 0 for queries that see no key, whose peak (highest score, or log-sum-exp) is −∞."""
    p = torch.softmax(scores, -1, out=scratch("p", *scores.shape))
    if rows.partial:
        empty = peak_RM.isneginf()
        if empty.any():
            p.masked_fill_(empty.unsqueeze(-1), 0.0)
    return p


def _product(a: Tensor, b: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """scale · a b, with the scale applied inside the matrix product."""
    return out.baddbmm_(a, b, beta=0, alpha=scale)
