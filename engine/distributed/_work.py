"""Operations that run while the caller goes on: one thread a communicator does them, in the order of the calls."""

import contextlib
import dataclasses
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from datetime import timedelta

import torch

# An operation in steps. It yields whether the next operation may begin besides, and returns its result.
Steps = Generator[bool, None, torch.Tensor]


class Work:
    """An operation under way. Its tensors must not be touched before it is done."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._result: list[torch.Tensor] = []
        self._future: torch.futures.Future = torch.futures.Future()

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """Waits until the operation is done, and raises what it raised.

        Args:
            timeout: seconds or a timedelta; None waits as long as the group's own timeout lets the operation.

        Returns:
            True.

        Raises:
            PeerError: what the operation itself raises.
            TimeoutError: it isn't done yet; it goes on, and may be waited for again.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        # Whoever is chained to the future finds it done before the event is set.
        if not self._future.done() and not self._done.wait(seconds):
            raise TimeoutError(f"the operation is not done after {seconds} s")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether it is done, well or not."""
        return self._future.done()

    def result(self) -> list[torch.Tensor]:
        """Waits, and returns what the future does."""
        self.wait()
        return self._result

    def get_future(self) -> torch.futures.Future:
        """A future of a list with the tensor that holds the result: of `t` itself where it works in place."""
        return self._future

    def _finish(self, result: torch.Tensor | None, error: Exception | None) -> None:
        self._error = error
        if result is not None:
            self._result = [result]
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(self._result)
        self._done.set()


@dataclasses.dataclass
class Operation:
    """What a worker does, and when it may begin while others end.

    Attributes:
        steps: makes what is run.
        may_begin: asked while others are under way that all let the next one begin; without it, it runs alone.
        touched: the tensors that it reads and writes: with one that touches the same it is never under way at once.
        numbered: its place among all operations is fixed. What is chained to its future may call others, which wait
            for those that are queued: that is run in a thread of its own.
    """

    steps: Callable[[], Steps]
    may_begin: Callable[[], bool] | None = None
    touched: tuple[torch.Tensor, ...] = ()
    numbered: bool = False
    work: Work = dataclasses.field(default_factory=Work)
    lets_next_begin: bool = False
    _steps: Steps | None = None

    def step(self) -> Callable[[], None] | None:
        """After the last one, what makes the work done."""
        try:
            if self._steps is None:
                self._steps = self.steps()
            self.lets_next_begin = next(self._steps)
            return None
        except StopIteration as end:
            return functools.partial(self.work._finish, end.value, None)
        except Exception as error:
            return functools.partial(self.work._finish, None, error)

    def fits_beside(self, others: "deque[Operation]") -> bool:
        """Whether it may begin while these are under way."""
        if self.may_begin is None or not all(other.lets_next_begin for other in others):
            return False
        try:
            mine = [_memory(t) for t in self.touched]
            theirs = [_memory(t) for other in others for t in other.touched]
        except RuntimeError:  # a tensor subclass without memory of its own
            return False
        apart = all(a_end <= b_begin or b_end <= a_begin for a_begin, a_end in mine for b_begin, b_end in theirs)
        return apart and self.may_begin()


def _memory(t: torch.Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


class Worker:
    """A thread that does one thing after the other; it starts with the first and ends with `stop`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # of numbered operations
        self._threads: list[threading.Thread] = []
        self._unfinished: deque[Work] = deque()
        self._submitting = threading.Lock()

    def submit(self, function: Callable[[], torch.Tensor]) -> Work:
        """Runs it alone. Its result or error will be the work's."""
        return self.submit_operation(Operation(lambda: _in_one_step(function)))

    def submit_operation(self, operation: Operation) -> Work:
        """Runs it in its turn."""
        with self._submitting:
            if not self._threads:
                self._start(_serve, self._queue, self._ended)
            if operation.numbered and len(self._threads) == 1:
                self._start(_finish, self._ended)
            while self._unfinished and self._unfinished[0]._done.is_set():
                self._unfinished.popleft()
            self._queue.put(operation)
            self._unfinished.append(operation.work)
        return operation.work

    def _start(self, target: Callable[..., None], *queues: queue.SimpleQueue) -> None:
        thread = threading.Thread(target=target, args=queues, name="engine.distributed", daemon=True)
        thread.start()
        self._threads.append(thread)

    def drain(self) -> None:
        """Waits until all that was submitted is done; its errors are its own works'."""
        if threading.current_thread() not in self._threads:
            for work in list(self._unfinished):
                work._done.wait()

    def stop(self) -> None:
        """Ends the thread once all is done."""
        threads, self._threads = self._threads, []
        if threads:
            self._queue.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2)


def _in_one_step(function: Callable[[], torch.Tensor]) -> Steps:
    return function()
    yield  # which makes a generator of it


def _finish(ended: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (finish := ended.get()) is not None:
        finish()
        del finish  # nothing is held while there is nothing to do


def _serve(
    submitted: "queue.SimpleQueue[Operation | None]", ended: "queue.SimpleQueue[Callable[[], None] | None]"
) -> None:
    """Steps of what is under way, the oldest first; what comes next begins when the newest lets it, or none is left."""
    running: deque[Operation] = deque()
    held: deque[Operation | None] = deque(maxlen=1)  # taken from the queue, and not begun
    while True:
        if not held and (not running or running[-1].lets_next_begin):
            with contextlib.suppress(queue.Empty):
                held.append(submitted.get(block=not running))
        if held and not running and held[0] is None:
            ended.put(None)
            return
        if held and held[0] is not None and (not running or held[0].fits_beside(running)):
            running.append(held.pop())  # type: ignore[arg-type]
        for _ in range(len(running)):  # nothing is held in a variable while there is nothing to do
            finish = running[0].step()
            if finish is None:
                running.append(running[0])
            elif running[0].numbered:
                ended.put(finish)
            else:
                finish()
            del finish
            running.popleft()
