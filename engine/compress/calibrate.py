"""calibrate: what the input of each Linear and Conv2d looks like, gathered in one streaming pass over batches."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from engine.compress import measure
from engine.compress.targets import find_targets
from engine.nn.conv2d import in_parts, patch_row_bytes, patches
from engine.ops.int8_quantize import SMALLEST_AMAX

METHODS = ("amax", "percentile", "least_squares")
BINS = 2048  # of the histogram of |x|; when a larger value comes its range doubles, and bins are merged in pairs
SMOOTHINGS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried; 1 would leave no channel room for more than was seen
LEAST_SHARE = 2.0**-10  # of the largest channel's amax: a channel that was seen near 0 may hold more later
UNSCALED = 2.0**30  # inputs as large as this, or as small as its inverse, are scaled before they are squared
LEAST_FRACTION, FRACTIONS = 0.2, 81  # least-squares scales that are tried: from this share of amax up to amax itself


@dataclasses.dataclass(eq=False)
class InputStatistics:
    """What was seen of a Linear's input `[..., K]`, or of the patches of a Conv2d's (engine.nn.conv2d).

    Attributes:
        rows: how many rows (tokens, patches).
        channel_amax: float32 `[K]`, the largest magnitude in each channel.
        channel_sum_squares: float64 `[K]`.
        counts: float64 `[BINS]`, a histogram of |x| over [0, top].
        top: where the histogram ends.
        moment_sum: float32 `[K, K]`, the sum of `x^T x` over all rows, where it was asked for; of `x / unit`.
        unit: a power of two: 1, but where squares would leave float32's range.
    """

    rows: int
    channel_amax: Tensor
    channel_sum_squares: Tensor
    counts: Tensor
    top: float
    moment_sum: Tensor | None = None
    unit: float = 1.0

    @property
    def amax(self) -> float:
        """The largest magnitude of all."""
        return self.channel_amax.amax().item() if self.channel_amax.numel() else 0.0

    @property
    def channel_mean_square(self) -> Tensor:
        """float32 `[K]`: infinite where inputs beyond 1e19 take it out of float32's range."""
        return (self.channel_sum_squares / max(1, self.rows)).float()

    @property
    def second_moment(self) -> Tensor:
        """float32 `[K, K]`: the mean of `x^T x` over rows. ValueError where it was not gathered.

        Infinite where inputs beyond 1e19 take it out of float32's range; `moment_sum` and `unit` still tell it.
        """
        if self.moment_sum is None:
            raise ValueError("engine.calibrate: the second moment was not gathered: give second_moment=True")
        return self.moment_sum / max(1, self.rows) * self.unit * self.unit  # the square alone may leave the range

    def input_scale(self, method: str = "amax", percentile: float = 99.99) -> float:
        """The scale for all of the input (static quantisation): what int8's 127 stands for, divided by 127.

        "amax": the largest magnitude, so that nothing is clipped; "percentile": the magnitude below which that share of
        the values lies; "least_squares": the one whose rounding and clipping together lose least.
        """
        if method not in METHODS:
            raise ValueError(f"engine.calibrate: method: expected one of {', '.join(METHODS)}, got {method!r}")
        if not 0 < percentile <= 100:
            raise ValueError(f"engine.calibrate: percentile: expected a number in (0, 100], got {percentile!r}")
        limit = self.amax
        if method == "percentile":
            wanted = self.counts.sum() * (percentile / 100)
            at = int(torch.searchsorted(self.counts.cumsum(0), wanted))
            limit = min(limit, self.top * (min(at, BINS - 1) + 1) / BINS)
        elif method == "least_squares" and limit >= SMALLEST_AMAX:
            centres = (torch.arange(BINS, dtype=torch.float64, device="cpu") + 0.5) * (self.top / BINS)
            limits = limit * torch.linspace(LEAST_FRACTION, 1, FRACTIONS, dtype=torch.float64, device="cpu")
            scale = limits.unsqueeze(1) / 127
            got = (centres / scale).round().clamp(max=127) * scale
            # Within the bin of 0 the centre says nothing; its values round to 0 under every scale that is tried.
            losses = ((got - centres).square() * self.counts)[:, 1:].sum(1)
            limit = limits[losses.argmin()].item()
        return max(limit, SMALLEST_AMAX) / 127

    def channel_scales(self, weight: Tensor, smooth: float | str) -> Tensor:
        """A scale for each channel, float32 `[K]`: the input is divided by them, and `weight` `[N, K]` multiplied.

        As Quantize(smooth=...) says it.
        """
        if smooth == "least_squares":
            tried = [self._channel_scales(weight, alpha) for alpha in SMOOTHINGS]
            return min(tried, key=lambda scales: self._expected_loss(weight, scales))
        return self._channel_scales(weight, float(smooth))

    def _channel_scales(self, weight: Tensor, alpha: float) -> Tensor:
        # In float64: a power of a tiny number is no longer one in float32.
        x = self.channel_amax.to(weight.device, torch.float64)
        x = x.clamp_min(max(LEAST_SHARE * self.amax, SMALLEST_AMAX))
        w = weight.detach().abs().amax(0).double()
        w = w.clamp_min(max(LEAST_SHARE * w.amax().item(), SMALLEST_AMAX))
        factor = w ** (1 - alpha) / x**alpha
        return ((x * factor).amax() / 127 / factor).float()

    def _expected_loss(self, weight: Tensor, scales: Tensor) -> float:
        """The expected squared error of a row of the output, roundings taken as independent and uniform."""
        w, rows = weight.detach().float(), max(1, self.rows)
        mean_square = (self.channel_sum_squares / rows).to(weight.device)
        # Where steps are coarser than the channel itself, it rounds to 0: no more than all of it is lost.
        squares = scales.double().square()
        of_input = torch.minimum(squares / 12, mean_square) @ w.square().sum(0, dtype=torch.float64)
        steps = (w * scales).abs().amax(1).double() / 127
        of_weight = steps.square().sum() / 12 * (mean_square / squares).sum()
        return (of_input + of_weight).item()

    def see(self, x: Tensor) -> None:
        """Adds the rows of `x` `[..., K]`."""
        x = torch.cat(x.detach().unbind()) if x.is_nested else x.detach()
        rows = x.reshape(-1, x.shape[-1]).float()
        if not rows.numel():
            return
        magnitudes = rows.abs()
        amax = magnitudes.amax(0)
        largest = amax.amax().item()
        if not largest < float("inf"):  # NaN too
            raise ValueError("holds a NaN or an infinity")
        self.rows += rows.shape[0]
        self._widen(largest)
        self.channel_amax = torch.maximum(self.channel_amax, amax)
        if self.top:
            self.counts += torch.histc(magnitudes, BINS, 0, self.top).double().cpu()
        else:
            self.counts[0] += magnitudes.numel()
        self._fit_unit()
        if self.unit != 1:
            rows = rows / self.unit
        self.channel_sum_squares += rows.square().sum(0, dtype=torch.float64) * self.unit**2
        if self.moment_sum is not None:
            self.moment_sum.addmm_(rows.t(), rows)

    def _fit_unit(self) -> None:
        """Changes the unit where what was seen is too large or too small for it."""
        if self.top == 0 or 1 / UNSCALED < self.top / self.unit < UNSCALED:
            return
        unit = 2.0 ** max(-126, math.floor(math.log2(self.top)))
        if self.moment_sum is not None:  # it becomes smaller only while the sum is 0
            self.moment_sum *= min(1.0, self.unit / unit) ** 2
        self.unit = unit

    def _widen(self, largest: float) -> None:
        """Doubles the histogram's range until `largest` lies inside."""
        if self.top == 0 and largest > 0:
            zeros = self.counts.sum()
            self.top, self.counts = largest, torch.zeros(BINS, dtype=torch.float64, device="cpu")
            self.counts[0] = zeros
        while self.top < largest:
            self.top *= 2
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])

    @classmethod
    def empty(cls, columns: int, device: torch.device, second_moment: bool) -> "InputStatistics":
        """Nothing seen yet."""
        return cls(
            rows=0,
            channel_amax=torch.zeros(columns, dtype=torch.float32, device=device),
            channel_sum_squares=torch.zeros(columns, dtype=torch.float64, device=device),
            counts=torch.zeros(BINS, dtype=torch.float64, device="cpu"),
            top=0.0,
            moment_sum=torch.zeros(columns, columns, dtype=torch.float32, device=device) if second_moment else None,
        )


@dataclasses.dataclass(eq=False)
class Calibration:
    """What :func:`calibrate` returns.

    Attributes:
        layers: by qualified name; names that share a weight share their statistics. A layer that no batch reached is
            not there.
        batches: how many were seen.
    """

    layers: dict[str, InputStatistics]
    batches: int

    def input_scales(self, method: str = "amax", percentile: float = 99.99) -> dict[str, float]:
        """The static input scale of every layer, as :meth:`InputStatistics.input_scale`."""
        return {name: statistics.input_scale(method, percentile) for name, statistics in self.layers.items()}


def check_calibration(owner: str, calibration: Any) -> None:
    """Raises TypeError unless it is one, or None."""
    if calibration is not None and not isinstance(calibration, Calibration):
        kind = type(calibration).__name__
        raise TypeError(f"engine.{owner}: calibration: expected what engine.calibrate returns, got {kind}")


def check_batches(owner: str, batches: Any) -> None:
    """Raises TypeError unless it can be iterated."""
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(f"engine.{owner}: batches: expected an iterable of batches, got {type(batches).__name__}")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: tuple[str, ...] = ("Linear", "Conv2d", "Conv1D"),
    ignore: tuple[str, ...] = (),
    second_moment: bool = False,
    progress: bool = True,
) -> Calibration:
    """Runs `model` on `batches` once, and keeps what static scales, smoothing and importance need to know of inputs.

    Memory does not grow with the number of batches: about 16 bytes a channel, and 4 K² a layer for second moments. The
    model is in eval mode meanwhile, without gradients, and as it was afterwards.

    Args:
        model: any module, not yet compressed.
        batches: tensors, tuples or lists of arguments, or mappings of keyword arguments. What a padding token gives
            counts as any other: leave padding out where there is much of it.
        targets: as in Recipe; embeddings have no statistics.
        ignore: as in Recipe.
        second_moment: also gather `x^T x`, `[K, K]` in fp32, which `Prune(importance="obs")` needs.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        ValueError: there is no batch, an input holds a NaN or an infinity (naming the layer), or as :func:`compress_`.
    """
    check_batches("calibrate", batches)
    found, _ = find_targets(model, targets, ignore, "calibrate")
    seen: dict[str, InputStatistics] = {}
    modules: dict[str, nn.Module] = {}
    owner: dict[str, str] = {}  # of each observed name, the target whose statistics it adds to
    for target in found:
        distinct: dict[int, str] = {}
        for name, module in zip(target.names, target.modules, strict=True):
            if type(module) is not nn.Embedding and distinct.setdefault(id(module), name) == name:
                modules[name], owner[name] = module, target.name
        if distinct:
            matrix = target.matrix
            seen[target.name] = InputStatistics.empty(matrix.shape[1], matrix.device, second_moment)

    def see(name: str, args: tuple, kwargs: dict, output: Any) -> None:
        try:
            for x in _rows(modules[name], args[0] if args else next(iter(kwargs.values()))):
                seen[owner[name]].see(x)
        except ValueError as error:
            raise ValueError(f"engine.calibrate: {name}: its input {error}") from None

    count = 0
    with measure.observing(model, modules, see), measure.evaluating(model):
        for batch in progressing(batches, "calibrating", progress):
            measure.run(model, batch)
            count += 1
    if count == 0:
        raise ValueError("engine.calibrate: batches: expected at least one, got none")
    layers = {n: seen[t.name] for t in found if t.name in seen and seen[t.name].rows for n in t.names}
    return Calibration(layers, count)


def _rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What `module` multiplies by its matrix `[N, K]`, `[..., K]`; a convolution's patches in parts."""
    if not isinstance(module, nn.Conv2d):
        yield x
        return
    view = patches(x if x.dim() == 4 else x.unsqueeze(0), module)
    for part in in_parts(view, patch_row_bytes(view)):
        yield part.flatten(3)


def progressing(items: Iterable[Any], what: str, wanted: bool) -> Iterator[Any]:
    """Yields the items with a progress bar on standard error, where that is a terminal and one is wanted."""
    console = Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    with Progress(console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        yield from bar.track(items, total=total, description=what)
