"""Which option to take for each layer: the knapsack of multiple choice, solved for every budget at once."""

import dataclasses
from collections.abc import Sequence

import numpy as np

# So many sums are told apart after each layer. Where there are more, the best of each of so many equal stretches of the
# cost stays, and the result is exact but for a fraction 1 / MOST_STATES of the cost's range a layer.
MOST_STATES = 20_000


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One choice for every layer, and what it comes to."""

    cost: float
    loss: float
    options: tuple[int, ...]


class Frontier:
    """All allocations of which none has another that is no worse in cost and in loss, and better in one.

    Args:
        costs: for each layer the cost of each of its options; any sign.
        losses: alike.
    """

    def __init__(self, costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> None:
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each state, the state before and the option taken
        cost, loss = np.zeros(1), np.zeros(1)
        for layer_costs, layer_losses in zip(costs, losses, strict=True):
            options = len(layer_costs)
            before = np.tile(np.arange(len(cost)), options)
            option = np.repeat(np.arange(options), len(cost))
            cost = cost[before] + np.asarray(layer_costs, dtype=np.float64)[option]
            loss = loss[before] + np.asarray(layer_losses, dtype=np.float64)[option]
            kept = _undominated(cost, loss)
            cost, loss = cost[kept], loss[kept]
            self._steps.append((before[kept], option[kept]))
        self.costs, self.losses = cost, loss  # rising cost, falling loss

    def __len__(self) -> int:
        return len(self.costs)

    def __getitem__(self, at: int) -> Allocation:
        options = []
        state = at
        for before, option in reversed(self._steps):
            options.append(int(option[state]))
            state = int(before[state])
        return Allocation(float(self.costs[at]), float(self.losses[at]), tuple(reversed(options)))

    def cheapest(self, loss: float) -> Allocation | None:
        """The one of least cost whose loss is at most `loss`."""
        fit = np.flatnonzero(self.losses <= loss)
        return self[int(fit[0])] if len(fit) else None

    def best(self, cost: float) -> Allocation | None:
        """The one of least loss whose cost is at most `cost`."""
        fit = np.flatnonzero(self.costs <= cost)
        return self[int(fit[-1])] if len(fit) else None


def _undominated(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the pairs that no other dominates, by rising cost."""
    order = np.lexsort((loss, cost))
    falling = np.minimum.accumulate(loss[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = falling[1:] < falling[:-1]
    kept = order[first]
    if len(kept) > MOST_STATES:
        low, high = cost[kept[0]], cost[kept[-1]]
        stretch = ((cost[kept] - low) / (high - low) * (MOST_STATES - 1)).astype(np.int64)
        last = np.ones(len(kept), dtype=bool)
        last[:-1] = stretch[1:] != stretch[:-1]  # of a stretch the last has the least loss
        last[0] = True
        kept = kept[last]
    return kept
