"""Which weights of a layer to keep, by more than their magnitude.

Everything here ends as what the fused pack ops take: a threshold for the weight as it is, or a weight whose dropped
places are zero already, to be packed at threshold 0.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine import ops
from engine.compress.calibrate import InputStatistics
from engine.compress.recipe import Prune
from engine.ops._block import BLOCK_SHAPE, block_areas, block_norms
from engine.ops._prune import as_threshold, keep_mask
from engine.ops._semi_structured import spread
from engine.ops.int8_quantize import SMALLEST_AMAX

COLUMNS_AT_ONCE = 128  # columns that are pruned before the rest of the layer is corrected, as in SparseGPT
DAMPING = 0.01  # share of the mean diagonal that is added to it
DAMPING_TRIES = 6  # each ten times the last
TIED = 0.01  # of all weights, so many beyond those wanted tell of ties
TIED_OF_KEPT = 0.1  # and so many of those to be kept; equals of bfloat16 weights on no grid stay below
AT_ONCE = 1 << 18  # weights compared in one step, so that what lies between stays in the cache
GOLDEN = 0.6180339887498949  # its multiples lie evenly in [0, 1)
LEAST_INPUT = 2.0**-20  # of the largest channel's norm: what a channel that was always zero counts as
# Of a row's amax, tried as the clipping limit.
CLIP_FRACTIONS = torch.linspace(0.5, 1.0, 26, dtype=torch.float32, device="cpu")

logger = logging.getLogger(__name__)


class NotInvertible(ValueError):
    """A second moment of which no inverse can be told."""


# The magnitude up to which scores go, and which share of those that equal it stays; None: none.
Cut = tuple[Tensor, Tensor | None]


def thresholds(scores: list[Tensor], sparsity: float, by_row: bool = False) -> list[Tensor]:
    """For each of the scores a threshold, so that together (or, of a single matrix, by row) the smallest magnitudes go.

    Of more equals than may go only some do: such a threshold has the scores' shape.
    """
    limit, stays = limit_and_ties(scores, sparsity, by_row)
    return [among_ties(score, limit, stays) for score in scores]


def limit_and_ties(scores: list[Tensor], sparsity: float, by_row: bool = False) -> Cut:
    """Where the scores are cut: the limit, and the share that stays, are `[]` or `[N, 1]`.

    Weights on a coarse grid (quantised before, signs alone) have so many equals that all of them would go. Zeros do go,
    as nothing is lost by that.
    """
    what = scores[0] if len(scores) == 1 else scores
    limit = ops.magnitude_threshold(what, sparsity, "row" if by_row else "tensor").float()
    count = scores[0].shape[1] if by_row else sum(score.numel() for score in scores)
    wanted = round(sparsity * count)

    def counted(compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        each = [_count_rows(score, limit, compare) for score in scores]
        return (each[0].unsqueeze(1) if by_row else torch.stack([rows.sum() for rows in each]).sum()).double()

    excess = counted(torch.le) - wanted
    split = (excess > most_beyond(count, wanted)) & (limit > 0)
    if not bool(split.any()):
        return limit, None
    return limit, torch.where(split, excess / counted(torch.eq).clamp_min(1), 0.0)


def blocks_cut(norms: list[Tensor], shapes: list[tuple[int, int]], sparsity: float, by_row: bool = False) -> Cut:
    """`limit_and_ties` for the norms of the blocks of matrices `[N, K]`, so that as near to `sparsity` of the *weights*
    go as whole blocks allow: those at an end may have few.
    """
    areas = [block_areas(*shape, device=norm.device) for norm, shape in zip(norms, shapes, strict=True)]
    if by_row and shapes[0][1] % BLOCK_SHAPE[1]:
        cuts = [_cut_by_area([norm], [area], sparsity) for norm, area in zip(norms[0].split(1), areas[0], strict=True)]
        if not cuts:
            return limit_and_ties(norms, sparsity, by_row)
        limit = torch.stack([limit for limit, _ in cuts]).unsqueeze(1)
        none = torch.zeros((), dtype=torch.float64, device=limit.device)
        stays = torch.stack([none if stays is None else stays for _, stays in cuts]).unsqueeze(1)
        return limit, stays if bool(stays.any()) else None
    return limit_and_ties(norms, sparsity, by_row) if by_row else _cut_by_area(norms, areas, sparsity)


def _cut_by_area(norms: list[Tensor], areas: list[Tensor], sparsity: float) -> Cut:
    """Of all blocks together the smallest norms, until their areas are nearest to `sparsity` of all."""
    area = torch.cat([each.reshape(-1) for each in areas])
    if not len(area) or bool((area == area[0]).all()):
        return limit_and_ties(norms, sparsity)
    order = torch.cat([norm.reshape(-1) for norm in norms]).argsort(stable=True)
    gone = pad(area[order].cumsum(0), (1, 0)).double()  # by how many blocks go
    count = int((gone - sparsity * gone[-1]).abs().argmin())
    return limit_and_ties(norms, max(0.0, count - 0.25) / len(area))  # rounds to the count, and is below 1


def most_beyond(count: int, wanted: int) -> float:
    """How many more than `wanted` of `count` weights may go before equals are told apart."""
    return min(TIED * count, TIED_OF_KEPT * (count - wanted))


def _count_rows(score: Tensor, limit: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """In each row, for how many magnitudes the comparison with the limit holds: int32 `[N]`."""
    step = max(1, AT_ONCE // max(1, score.shape[1]))
    pairs = zip(score.detach().split(step), limit.expand(score.shape[0], 1).split(step), strict=True)
    return torch.cat([compare(part.float().abs(), limits).sum(1, dtype=torch.int32) for part, limits in pairs])


def among_ties(score: Tensor, limit: Tensor, stays: Tensor | None) -> Tensor:
    """The threshold for `score` `[N, K]` that `limit_and_ties` means."""
    if stays is None:
        return limit
    each = _count_rows(score, limit, torch.eq).unsqueeze(1)
    # By row, or as evenly over the rows as whole numbers can be.
    keep = stays * each if stays.dim() else (stays * each.cumsum(0)).round().diff(dim=0, prepend=each.new_zeros(1, 1))
    keep = keep.round().long()
    # In each row from another place on, so that no column loses more than others.
    rows = torch.arange(score.shape[0], dtype=torch.float64, device=score.device).unsqueeze(1)
    begin = (rows * GOLDEN % 1 * each).long()
    columns = score.shape[1]
    dtype = torch.int32 if columns * (columns + 1) < 1 << 31 else torch.int64
    each, keep, begin = (t.to(dtype) for t in (each, keep, begin))
    limits = limit.expand(score.shape[0], 1)
    threshold = limits.expand(score.shape).contiguous()
    for some in keep.squeeze(1).nonzero().squeeze(1).split(max(1, AT_ONCE // max(1, columns))):
        magnitudes = score.detach()[some].float().abs()
        tied = magnitudes == limits[some]
        place = tied.cumsum(1, dtype=dtype).mul_(keep[some]).add_(begin[some]).remainder_(each[some])
        threshold[some] = torch.where(tied & (place < keep[some]), -1.0, limits[some])
    return threshold


def input_norms(statistics: InputStatistics, device: torch.device) -> Tensor:
    """The norm of each channel of the input, relative to the largest: fp32 `[K]`."""
    norm = statistics.channel_sum_squares.sqrt()
    return (norm / norm.amax().clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(LEAST_INPUT).float().to(device)


def wanda_threshold(weight: Tensor, statistics: InputStatistics, prune: Prune) -> Tensor:
    """The threshold for each weight, `[N, K]`, that keeps the largest `|w| * norm(x)`.

    Wanda: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023. Channels that were
    always zero go first.
    """
    norm = input_norms(statistics, weight.device)
    assert prune.sparsity is not None
    score = weight.detach().float() * norm
    limit, stays = limit_and_ties([score], prune.sparsity, prune.scope == "row")
    if stays is not None:
        return among_ties(score, limit, stays)
    del score  # as large as what follows
    return (limit / norm).expand(weight.shape)


def semi_structured(weight: Tensor, score: Tensor) -> Tensor:
    """`weight` `[N, K]` with all but the two largest scores of every four along K set to zero, as
    :func:`engine.ops.prune_to_semi_structured` does by magnitude: of equals the lower column stays.
    """
    values, metadata = ops.prune_to_semi_structured(score)
    keep = spread(torch.ones_like(values), metadata)[:, : weight.shape[1]] != 0
    return torch.where(keep, weight.detach(), 0)


def block(weight: Tensor, score: Tensor, prune: Prune, cut: Cut | None = None) -> Tensor:
    """`weight` with the blocks set to zero whose scores' root mean square is below the cut; None: chosen by the
    sparsity that `prune` wants.
    """
    norms = block_norms(score)
    if cut is None:
        assert prune.sparsity is not None
        cut = blocks_cut([norms], [(weight.shape[0], weight.shape[1])], prune.sparsity, prune.scope == "row")
    keep = keep_mask(norms, as_threshold("prune_to_block", norms, among_ties(norms, *cut)))
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
    for begin in range(0, columns, COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, columns)
        block, factor = work[begin:end], upper[begin:end, begin:end]
        error = torch.empty_like(block)
        # Columns whose input was always zero go first.
        diagonal = torch.where(dead[begin:end], factor.diagonal() / LEAST_INPUT, factor.diagonal()).unsqueeze(1)
        keep = None
        if pattern == "unstructured" and sparsity is not None:
            score = (block.abs() / diagonal).t().contiguous()
            (threshold,) = thresholds([score], sparsity, scope == "row")
            keep = (score > threshold).t()
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


def _inverse_factor(second_moment: Tensor, dead: Tensor, name: str) -> Tensor:
    """The upper Cholesky factor of the damped second moment's inverse, `[K, K]`.

    Raises the damping, and says so, until the matrix can be inverted; NotInvertible where it never can.
    """
    if not bool(second_moment.isfinite().all()):
        raise NotInvertible(f"engine.compress_: {name}: the second moment of its input holds a NaN or an infinity")
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
    raise NotInvertible(f"engine.compress_: {name}: the second moment of its input can't be inverted")
