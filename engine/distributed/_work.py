"""Operations that run while the caller goes on: one thread a communicator does them, in the order of the calls."""

import queue
import threading
from collections.abc import Callable
from datetime import timedelta

import torch


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


class Worker:
    """A thread that does one thing after the other; it starts with the first and ends with `stop`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Work, Callable[[], torch.Tensor]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Work | None = None

    def submit(self, function: Callable[[], torch.Tensor]) -> Work:
        """Its result or error will be the work's."""
        work = Work()
        self._queue.put((work, function))
        self._last = work
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,), name="engine.distributed", daemon=True)
            self._thread.start()
        return work

    def drain(self) -> None:
        """Waits until all that was submitted is done; its errors are its own works'."""
        if self._last is not None and threading.current_thread() is not self._thread:
            self._last._done.wait()
            self._last = None

    def stop(self) -> None:
        """Ends the thread once all is done."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(timeout=2)


def _serve(submitted: "queue.SimpleQueue[tuple[Work, Callable[[], torch.Tensor]] | None]") -> None:
    while (item := submitted.get()) is not None:
        work, function = item
        try:
            result = function()
        except Exception as error:
            work._finish(None, error)
        else:
            work._finish(result, None)
        del item, work, function  # nothing is held while there is nothing to do
