"""A simulated cluster in one process: machines, processes and threads under a scheduler that a seed
decides alone.

Each simulated thread is a real one, but only the holder of the baton runs. It hands the baton on in
each call to a disk or a bucket (`Simulator.call`) and in each wait; the generator of the seed draws
who goes on. Time is simulated: it goes on a little with each call, and jumps where all wait.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import math
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

MOST_CALLS = 60_000
SHOWN = 60  # of the newest calls, with a failure


class KilledError(BaseException):
    """Ends a thread whose process was killed: nothing that it does afterwards has any effect."""


class SimulationError(AssertionError):
    """The simulated program has broken a promise; the text has the seed and the newest calls."""


class Process:
    """A process of a machine. `due` has what befalls it, by the number of its call."""

    def __init__(self, simulator: Simulator, name: str, machine: Any) -> None:
        self.simulator, self.name, self.machine = simulator, name, machine
        self.is_dead, self.frozen_until, self.calls = False, 0.0, 0
        self.due: dict[int, Callable[[], object]] = {}

    def kill(self) -> None:
        self.is_dead = True

    def freeze(self, seconds: float) -> None:
        """Let it sleep; what went on meanwhile it only sees when it looks."""
        self.frozen_until = self.simulator.now + seconds
        self.simulator.at(self.frozen_until, lambda: None)


class Task:
    """A thread of a process; `is_ready` tells whether it can go on before its `deadline`."""

    def __init__(self, process: Process, name: str) -> None:
        self.process, self.name = process, name
        self.baton = threading.Semaphore(0)
        self.is_ready: Callable[[], object] = lambda: True
        self.deadline = 0.0
        self.is_over = False

    def can_run(self, now: float) -> bool:
        if self.process.is_dead:
            return True  # to come to its end
        if now < self.process.frozen_until:
            return False
        return now >= self.deadline or bool(self.is_ready())


class Simulator:
    """The scheduler. All that it draws comes from `random`."""

    def __init__(self, seed: object) -> None:
        self.random, self.seed = random.Random(f"schedule {seed}"), seed
        self.now, self.trace = 1000.0, list[str]()
        self._tasks, self._events = list[Task](), list[tuple[float, int, Callable[[], object]]]()
        self.current: Task | None = None
        self._over, self._count = threading.Semaphore(0), 0
        self.failure: BaseException | None = None

    # --- for the simulated parts ---

    @property
    def process(self) -> Process:
        assert self.current is not None, "a simulated thread runs"
        return self.current.process

    def call(self, what: str) -> None:
        """A scheduling point: others may run, and this process may be killed or frozen, before what
        is called takes effect."""
        process = self.process
        if process.is_dead:
            raise KilledError
        process.calls += 1
        self.note(what)
        if len(self.trace) > MOST_CALLS:
            self.fail(SimulationError(f"no end after {MOST_CALLS} calls"))
        self.now += self.random.uniform(0.0, 0.002)
        if befalls := process.due.pop(process.calls, None):
            befalls()
        self.switch()

    def note(self, what: str) -> None:
        """Add a line to the trace."""
        what = " ".join(what.split())
        name = self.current.name if self.current else "-"
        self.trace.append(f"{self.now:.4f} {name}: {what}")

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def share_of(self, count: int) -> int:
        """Draw a number below `count`, which takes one draw whatever that is: sizes of records are
        not the same in all processes."""
        return int(self.random.random() * count)

    def at(self, time: float, do: Callable[[], object]) -> None:
        """Do something at a time, or right after it."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, do))

    def wait(
        self, is_ready: Callable[[], object] = lambda: False, limit_s: float = math.inf
    ) -> bool:
        """Wait for a condition; return whether it came true."""
        if self.process.is_dead:
            raise KilledError
        self.switch(is_ready, self.now + max(limit_s, 0.0))
        return bool(is_ready())

    def spawn(self, process: Process, name: str, work: Callable[[], object]) -> Task:
        """Begin a thread of a process."""
        task = Task(process, f"{process.name}/{name}" if name else process.name)
        self._tasks.append(task)

        def run() -> None:
            task.baton.acquire()
            try:
                if not process.is_dead:
                    work()
            except KilledError:
                pass
            except BaseException as error:  # noqa: BLE001 - `run` raises it
                self.failure = self.failure or error
            task.is_over = True
            self._tasks.remove(task)
            self._hand_on()

        threading.Thread(target=run, daemon=True).start()
        return task

    def switch(
        self, is_ready: Callable[[], object] = lambda: True, deadline: float = math.inf
    ) -> None:
        """Let others run until `is_ready` or the deadline; perhaps nobody."""
        task = self.current
        assert task is not None
        task.is_ready, task.deadline = is_ready, deadline
        if self._hand_on() is not task:
            task.baton.acquire()
        if task.process.is_dead:
            raise KilledError

    def _hand_on(self) -> Task | None:
        """Give the baton to whoever goes on, and return that one; None: all is over."""
        before, self.current = self.current, None
        chosen = self._next() if self.failure is None else None
        self.current = chosen
        if chosen is None:
            self._over.release()
        elif chosen is not before:
            chosen.baton.release()  # from here on it runs
        return chosen

    def _next(self) -> Task | None:
        while self._tasks:
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            if ready := [task for task in self._tasks if task.can_run(self.now)]:
                return self.random.choice(ready)
            times = [t.deadline for t in self._tasks if self.now >= t.process.frozen_until]
            times += [self._events[0][0]] if self._events else []
            if (soonest := min(times, default=math.inf)) == math.inf:
                waiting = [task.name for task in self._tasks]
                self.failure = SimulationError(f"all wait for each other: {waiting}")
                return None
            self.now = max(self.now, soonest)
        return None

    def fail(self, error: BaseException) -> None:
        """End the simulation, from any of its threads."""
        self.failure = self.failure or error
        raise KilledError

    # --- for the test ---

    def run(self, process: Process, work: Callable[[], object]) -> None:
        """Run `work` as the first thread, and all that it begins, to the end."""
        gc.disable()  # what it ends would run in whatever thread it is noticed in
        try:
            self.spawn(process, "", work)
            self._hand_on()
            self._over.acquire()
        finally:
            gc.enable()
        if self.failure is not None:
            newest = "\n  ".join(self.trace[-SHOWN:])
            raise SimulationError(
                f"SEED={self.seed}: {type(self.failure).__name__}: {self.failure}\n"
                f"the newest of {len(self.trace)} calls:\n  {newest}"
            ) from self.failure


class Time:
    """What the module `time` is to the program."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    def monotonic(self) -> float:
        return self._simulator.now

    time = perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self._simulator.wait(limit_s=seconds)

    def strftime(self, form: str) -> str:
        return f"{self._simulator.now:.0f}"


class Threading:
    """What the module `threading` is to the program. No code holds a lock in a call to a store, so
    conditions need none."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    def Event(self) -> Event:  # noqa: N802
        return Event(self._simulator)

    def Condition(self) -> Condition:  # noqa: N802
        return Condition(self._simulator)

    def Thread(self, target: Callable[[], object], daemon: bool, name: str) -> Thread:  # noqa: N802
        assert daemon, "it ends with its process"
        return Thread(self._simulator, target, name)


class Event:
    def __init__(self, simulator: Simulator) -> None:
        self._simulator, self._is_set = simulator, False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, limit_s: float | None = None) -> bool:
        return self._simulator.wait(self.is_set, math.inf if limit_s is None else limit_s)


class Condition(contextlib.AbstractContextManager["Condition"]):
    def __init__(self, simulator: Simulator) -> None:
        self._simulator, self._notified = simulator, 0

    def __exit__(self, *error: object) -> None:
        pass

    def notify_all(self) -> None:
        self._notified += 1

    def wait(self, limit_s: float | None = None) -> bool:
        before = self._notified
        return self._simulator.wait(
            lambda: self._notified > before, math.inf if limit_s is None else limit_s
        )


class Thread:
    def __init__(self, simulator: Simulator, target: Callable[[], object], name: str) -> None:
        self._simulator, self._target, self._name = simulator, target, name
        self._task: Task | None = None

    def start(self) -> None:
        self._task = self._simulator.spawn(self._simulator.process, self._name, self._target)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_over

    def join(self, limit_s: float | None = None) -> None:
        """Wait for its end; not when garbage of a dead process is collected in another thread."""
        task, current = self._task, self._simulator.current
        if task is not None and current is not None and task.process is current.process:
            limit_s = math.inf if limit_s is None else limit_s
            self._simulator.wait(lambda: not self.is_alive(), limit_s)


class Pool(contextlib.AbstractContextManager["Pool"]):
    """What ThreadPoolExecutor is to the program: all is done at once, one after the other."""

    def __init__(self, workers: int, thread_name_prefix: str = "") -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001 - the future raises it
            future.set_exception(error)
        return future

    def map(self, work: Callable[..., Any], *each: Any) -> Iterator[Any]:
        futures = [self.submit(work, *arguments) for arguments in zip(*each, strict=True)]
        return (future.result() for future in futures)

    def shutdown(self, *, wait: bool = True, cancel_futures: bool = False) -> None:
        pass
