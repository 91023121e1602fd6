"""Runs the model on the example inputs: what each layer sees, how long each takes, dense and compressed in turn."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engine.nn._replace import set_item, switches_of_fused_paths

# A round is one forward pass of each side. Below the least, a median says nothing; the time limit bounds large models.
# Even numbers, so that as many rounds begin with one side as with the other.
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 8, 32, 15.0


def run(model: nn.Module, inputs: Any) -> Any:
    """Calls `model` with a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    What it may change as it runs, a cache say, is a copy, so that the next run is of the same.
    """
    return _call(model, _fresh(model, inputs))


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _fresh(model: nn.Module, inputs: Any) -> Any:
    """`inputs` with copies of what is no tensor and nothing to call; of containers of these the containers are new."""
    memo: dict[int, Any] = {id(module): module for module in model.modules()}  # a method of one stays its own
    return _copied(dict(inputs) if isinstance(inputs, Mapping) else inputs, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor) or callable(value):
        return value
    if type(value) in (list, tuple):
        return type(value)(_copied(item, memo) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one
        return type(value)(*(_copied(item, memo) for item in value))
    if type(value) is dict:
        return {key: _copied(item, memo) for key, item in value.items()}
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # it can't be copied, as a generator can't, and a cache made with gradients
        return value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, so that a forward pass changes nothing; each module's own mode comes back.

    Not inference mode: what the model caches in a forward pass must be fit for training afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def replaced(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """`model` with the modules of these qualified names replaced, and as it was again afterwards."""
    restore = replace_(model, replacements)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def _unfused(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """`model` calling the modules of these names with plain tensors, as it will when they are replaced."""
    with contextlib.ExitStack() as undo:
        for name in names:
            for attributes, key, value in switches_of_fused_paths(model, name):
                set_item(attributes, key, value, undo)
        yield


def replace_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Puts the modules in place, each under its qualified name, or none of them; returns what puts all back."""
    with contextlib.ExitStack() as undo:
        for name, module in replacements.items():
            path, _, child = name.rpartition(".")
            set_item(model.get_submodule(path)._modules, child, module, undo)
            for attributes, key, value in switches_of_fused_paths(model, name):
                set_item(attributes, key, value, undo)
        return undo.pop_all().close


def observe(
    model: nn.Module, inputs: Any, modules: Mapping[str, nn.Module], see: Callable[[str, tuple, dict, Any], None]
) -> None:
    """One forward pass, calling `see(name, args, kwargs, output)` after every call of one of `modules`."""
    with observing(model, modules, see), evaluating(model):
        run(model, inputs)


@contextlib.contextmanager
def observing(
    model: nn.Module, modules: Mapping[str, nn.Module], see: Callable[[str, tuple, dict, Any], None]
) -> Iterator[None]:
    """Calls `see(name, args, kwargs, output)` after every call of one of `modules` while it lasts."""
    handles = []
    try:
        for name, module in modules.items():

            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
                see(name, args, kwargs, output)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        with _unfused(model, modules):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Clock:
    """Adds up the seconds spent in each of some modules; on a GPU each reading waits for the device."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.seconds = dict.fromkeys(modules, 0.0)
        self._started: dict[str, float] = {}
        self._handles = []
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._start(name)))
            self._handles.append(module.register_forward_hook(lambda *_, name=name: self._stop(name)))

    @staticmethod
    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start(self, name: str) -> None:
        self._started[name] = self.now()

    def _stop(self, name: str) -> None:
        self.seconds[name] += self.now() - self._started[name]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def time_layers(
    model: nn.Module, inputs: Any, candidates: Mapping[str, nn.Module]
) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """Median seconds `(dense, compressed)` of each candidate, in place inside whole forward passes, and of the model.

    Each round runs the dense model and the compressed one, one after the other, so that noise falls on both, and every
    layer meets the caches as it will in use. Which goes first changes, as the second finds what the first left.
    """
    dense = {name: model.get_submodule(name) for name in candidates}
    # A module that stands under several names is timed once, under the first.
    first_names = {id(module): name for name, module in reversed(dense.items())}
    timed = [name for name, module in dense.items() if first_names[id(module)] == name]
    dense, compressed = {n: dense[n] for n in timed}, {n: candidates[n] for n in timed}
    rounds = _rounds(model, inputs, [({}, dense), (candidates, compressed)])
    layers = {name: (_median(d[0][name] for d, _ in rounds), _median(c[0][name] for _, c in rounds)) for name in timed}
    return layers, (_median(d[1] for d, _ in rounds), _median(c[1] for _, c in rounds))


def time_model(model: nn.Module, inputs: Any, candidates: Mapping[str, nn.Module]) -> tuple[float, float]:
    """Median seconds of a forward pass, dense and with `candidates` in place, interleaved and without hooks."""
    before, after = time_variants(model, inputs, [{}, candidates])
    return before, after


def time_variants(model: nn.Module, inputs: Any, variants: Sequence[Mapping[str, nn.Module]]) -> list[float]:
    """Median seconds of a forward pass with each of the variants in place, interleaved and without hooks."""
    rounds = _rounds(model, inputs, [(modules, {}) for modules in variants])
    return [_median(seconds for _, seconds in passes) for passes in zip(*rounds, strict=True)]


Pass = tuple[dict[str, float], float]  # seconds in each module that was timed, and in all


def _rounds(
    model: nn.Module, inputs: Any, sides: Sequence[tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]]]
) -> list[list[Pass]]:
    """The passes of each round, in the order of `sides`: each a pair of what to put in place and what to time."""
    rounds = []
    with evaluating(model):
        begun = time.perf_counter()
        for i in range(MOST_ROUNDS + 1):
            passes = {}
            for side in _order(i, len(sides)):
                modules, timed = sides[side]
                with replaced(model, modules):
                    passes[side] = _timed_pass(model, inputs, timed)
            if i > 0:  # the first round warms up
                rounds.append([passes[side] for side in range(len(sides))])
            if i >= LEAST_ROUNDS and i % 2 == 0 and time.perf_counter() - begun > SECONDS:
                break
    return rounds


def _order(i: int, count: int) -> list[int]:
    """The order of `count` sides in round `i`: turned round every other time, and begun one further after two.

    Two sides go AB BA BA AB: as often first as second, and as often after themselves as after each other.
    """
    order = [(i // 2 + j) % count for j in range(count)]
    return order[::-1] if i % 2 else order


def _timed_pass(model: nn.Module, inputs: Any, modules: Mapping[str, nn.Module]) -> Pass:
    clock = _Clock(modules)
    inputs = _fresh(model, inputs)  # copying is not timed
    try:
        start = clock.now()
        _call(model, inputs)
        return clock.seconds, clock.now() - start
    finally:
        clock.remove()


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
