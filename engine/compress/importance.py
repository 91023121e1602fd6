"""Which weights of a layer to keep, by more than their magnitude.

Everything here ends as what the fused pack ops take: a threshold for the weight as it is, or a weight whose dropped
places are zero already, to be packed at threshold 0.
"""

import logging

import torch
from torch import Tensor

from engine import ops
from engine.compress.calibrate import InputStatistics
from engine.compress.recipe import Prune
from engine.ops._block import BLOCK_SHAPE, block_norms
from engine.ops._prune import as_threshold, keep_mask
from engine.ops._semi_structured import spread
from engine.ops.int8_quantize import SMALLEST_AMAX

COLUMNS_AT_ONCE = 128  # columns that are pruned before the rest of the layer is corrected, as in SparseGPT
DAMPING = 0.01  # share of the mean diagonal that is added to it
DAMPING_TRIES = 6  # each ten times the last
TIED = 0.01  # a share of weights beyond the one wanted that tells of ties
CLIP_FRACTIONS = torch.linspace(0.5, 1.0, 26)  # of a row's amax, tried as the clipping limit

logger = logging.getLogger(__name__)


def beside_ties(weights: list[Tensor], threshold: Tensor, sparsity: float) -> Tensor:
    """The threshold, or one just below where so many magnitudes equal it that this drops a share nearer to what is
    wanted: of weights on a coarse grid (quantised before, signs alone) the threshold itself may drop all.
    """
    by_row = threshold.dim() > 0
    count = weights[0].shape[1] if by_row else sum(weight.numel() for weight in weights)

    def dropped(limit: Tensor) -> Tensor:
        each = [(weight.detach().float().abs() <= limit).sum(1) for weight in weights]
        return (each[0] if by_row else torch.stack([rows.sum() for rows in each]).sum()).double() / max(1, count)

    above = dropped(threshold) - sparsity
    if not bool((above > TIED).any()):
        return threshold
    lower = torch.nextafter(threshold.float(), torch.zeros_like(threshold, dtype=torch.float32))
    nearer = (above > TIED) & (above >= sparsity - dropped(lower))
    return torch.where(nearer.reshape(threshold.shape), lower, threshold.float())


def wanda_threshold(weight: Tensor, statistics: InputStatistics, prune: Prune) -> Tensor:
    """The threshold for each weight, `[N, K]`, that keeps the largest `|w| * norm(x)`.

    Wanda: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023. A channel that was
    always zero is dropped.
    """
    norm = statistics.channel_mean_square.sqrt().to(weight.device)
    scope = "row" if prune.scope == "row" else "tensor"
    assert prune.sparsity is not None
    limit = ops.magnitude_threshold(weight.detach().float() * norm, prune.sparsity, scope)
    return torch.where(norm > 0, limit / norm.clamp_min(SMALLEST_AMAX), torch.inf).expand(weight.shape)


def semi_structured(weight: Tensor, score: Tensor) -> Tensor:
    """`weight` `[N, K]` with all but the two largest scores of every four along K set to zero, as
    :func:`engine.ops.prune_to_semi_structured` does by magnitude: of equals the lower column stays.
    """
    values, metadata = ops.prune_to_semi_structured(score)
    keep = spread(torch.ones_like(values), metadata)[:, : weight.shape[1]] != 0
    return torch.where(keep, weight.detach(), 0)


def block(weight: Tensor, score: Tensor, prune: Prune, threshold: Tensor | float | None = None) -> Tensor:
    """`weight` with the blocks set to zero whose scores' root mean square is at most the threshold; None: chosen by
    the sparsity that `prune` wants.
    """
    norms = block_norms(score)
    if threshold is None:
        assert prune.sparsity is not None
        threshold = ops.magnitude_threshold(norms, prune.sparsity, "row" if prune.scope == "row" else "tensor")
    keep = keep_mask(norms, as_threshold("prune_to_block", norms, threshold))
    inside = keep.repeat_interleave(BLOCK_SHAPE[0], 0).repeat_interleave(BLOCK_SHAPE[1], 1)
    return torch.where(inside[: weight.shape[0], : weight.shape[1]], weight.detach(), 0)


def clip_scales(weight: Tensor, mean_square: Tensor | None = None) -> Tensor:
    """For each row the int8 scale that loses least by rounding and clipping together: fp32 `[N]`.

    `mean_square` `[K]`, of the input's channels, weighs the errors as the output feels them; None: all alike.
    """
    values = weight.detach().float()
    amax = values.abs().amax(1) if values.shape[1] else values.new_zeros(values.shape[0])
    best = torch.full_like(amax, torch.inf)
    scale = torch.ones_like(amax)
    for fraction in CLIP_FRACTIONS.tolist():
        tried = torch.where(amax < SMALLEST_AMAX, 1.0, amax * (fraction / 127)).unsqueeze(1)
        error = ((values / tried).round_().clamp_(-127, 127).mul_(tried)).sub_(values).square_()
        loss = error.sum(1) if mean_square is None else error @ mean_square
        better = loss <= best
        best, scale = torch.where(better, loss, best), torch.where(better, tried.squeeze(1), scale)
    return scale


def obs_prune(
    weight: Tensor,
    second_moment: Tensor,
    sparsity: float | None,
    *,
    pattern: str = "unstructured",
    scope: str = "layer",
    scale: Tensor | None = None,
    name: str = "the layer",
) -> Tensor:
    """`weight` pruned, the weights that are kept corrected for what was dropped, so that the output changes least.

    SparseGPT: Frantar and Alistarh, 2023. Columns are pruned in blocks, a column's error (of pruning, and of rounding
    to int8 where `scale` is given) made good by those that follow, as the inverse second moment of the inputs says.

    Besides the arguments it holds the weight twice and one K×K matrix, all in fp32.

    Args:
        weight: `[N, K]`, float.
        second_moment: fp32 `[K, K]`, the mean (or sum) of `x^T x`. Stays as it is.
        sparsity: fraction to drop in each block; with "2:4" it is half and this is not read; None prunes nothing.
        pattern: "unstructured" or "2:4".
        scope: "layer" (places in all rows compete in a block) or "row".
        scale: fp32 `[N]`: what is kept is rounded to multiples of it, at most 127; None leaves it float.
        name: for messages.

    Returns:
        fp32 `[N, K]` with zeros where pruned.
    """
    columns = weight.shape[1]
    dead = second_moment.diagonal() == 0
    upper = _inverse_factor(second_moment, dead, name)
    work = weight.detach().t().float().clone(memory_format=torch.contiguous_format)  # [K, N]: a column lies together
    work[dead] = 0
    for begin in range(0, columns, COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, columns)
        block, factor = work[begin:end], upper[begin:end, begin:end]
        error = torch.empty_like(block)
        diagonal = factor.diagonal().unsqueeze(1)
        keep = None
        if pattern == "unstructured" and sparsity is not None:
            keep = _keep(block.abs() / diagonal, sparsity, scope)
        for i in range(end - begin):
            if pattern == "2:4" and i % 4 == 0 and begin + i + 4 <= columns:
                # Chosen only now, as the columns before have changed these four.
                lowest = (block[i : i + 4].abs() / diagonal[i : i + 4]).topk(2, dim=0, largest=False).indices
                keep = torch.ones_like(block, dtype=torch.bool) if keep is None else keep
                keep[i : i + 4].scatter_(0, lowest, False)
            column = block[i]
            new = column if keep is None else torch.where(keep[i], column, 0.0)
            if scale is not None:
                new = (new / scale).round_().clamp_(-127, 127).mul_(scale)
            error[i] = (column - new) / factor[i, i]
            block[i] = new
            if i + 1 < end - begin:
                block[i + 1 :].addr_(factor[i, i + 1 :], error[i], alpha=-1)
        if end < columns:
            work[end:].addmm_(upper[begin:end, end:].t(), error, alpha=-1)
    return work.t().contiguous()


def _keep(score: Tensor, sparsity: float, scope: str) -> Tensor:
    """Where the scores `[B, N]` of a block are above the threshold: of the block, or of each row of the weight."""
    if scope == "row":
        return score > ops.magnitude_threshold(score.t().contiguous(), sparsity, "row").t()
    return score > ops.magnitude_threshold(score, sparsity)


def _inverse_factor(second_moment: Tensor, dead: Tensor, name: str) -> Tensor:
    """The upper Cholesky factor of the damped second moment's inverse, `[K, K]`.

    Raises the damping, and says so, until the matrix can be inverted.
    """
    if not bool(second_moment.isfinite().all()):
        raise ValueError(f"engine.compress_: {name}: the second moment of its input holds a NaN or an infinity")
    diagonal = second_moment.diagonal()
    mean = diagonal.mean().item() or 1.0
    for attempt in range(DAMPING_TRIES):
        damping = DAMPING * 10**attempt
        matrix = second_moment.clone()
        matrix.diagonal().copy_(torch.where(dead, mean, diagonal) + damping * mean)
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, info))
        if info.item() == 0:
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, info))
            if info.item() == 0 and bool(matrix.diagonal().isfinite().all()):
                return matrix
        logger.warning("%s: its second moment can't be inverted with damping %g: trying ten times that", name, damping)
    raise ValueError(f"engine.compress_: {name}: the second moment of its input can't be inverted")
