"""One thread, one seed, virtual time: tasks that a scheduler switches, and the processes that they are in.

Tasks are greenlets. One runs until it waits for something; then the seed chooses which goes on. Where none can, time
passes to the next moment at which something happens. Nothing here knows of the service.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import greenlet

PREEMPTED = 0.05
"""How often whoever takes a lock lets others go first."""


class Killed(BaseException):
    """The process of a task has been killed. What its code does on the way out has no effect."""


class Hang(AssertionError):
    """Somebody waits for ever, or for longer than anybody has to."""


class Task:
    """One thread of a process."""

    def __init__(self, process: Process, name: str, target: Callable[[], object]) -> None:
        self.process = process
        self.name = name
        self.waits_for = ""
        self.ended = False
        self.joining: list[Task] = []
        self._target = target
        self.greenlet = greenlet.greenlet(self._run, parent=process.world.main)

    def _run(self) -> None:
        world = self.process.world
        try:
            if self.process.alive:
                self._target()
        except Killed:
            pass
        # The run fails with it, in the scheduler.
        except BaseException as error:  # noqa: BLE001
            if self.process.alive:
                world.failures.append(error)
        finally:
            self.ended = True
            self.process.tasks.discard(self)
            world.wake_all(self.joining)

    def __str__(self) -> str:
        return f"{self.process.name}: {self.name} waits for {self.waits_for or 'its turn'}"


class Process:
    """Tasks that end together."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.tasks: set[Task] = set()

    def start(self, target: Callable[[], object], name: str) -> Task:
        """Let a task run."""
        task = Task(self, name, target)
        self.tasks.add(task)
        self.world.ready.append(task)
        return task

    def kill(self) -> None:
        """End all tasks where they are, as kill -9 does."""
        self.alive = False
        for task in sorted(self.tasks, key=lambda task: task.name):
            if task is not self.world.current:
                self.world.let_go_on(task)


class World:
    """The scheduler.

    Args:
        seed: Of all choices.
        trace: Told what happens, with its time.

    Attributes:
        random: Makes the choices.
        now: Seconds since the beginning.
        current: The task that runs; None while the scheduler does.
        ready: Tasks that can go on.
        failures: What tasks have ended with.
    """

    def __init__(self, seed: int, trace: Callable[[str], object] | None = None) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.main = greenlet.getcurrent()
        self.current: Task | None = None
        self.ready: list[Task] = []
        self.failures: list[BaseException] = []
        self.processes: list[Process] = []
        self._timers: list[tuple[float, int, list[Callable[[], object]]]] = []
        self._count = 0
        self._trace = trace

    def log(self, text: Callable[[], str]) -> None:
        """Note what happens, where somebody wants to know."""
        if self._trace is not None:
            self._trace(f"{self.now:10.4f}  {text()}")

    def process(self, name: str) -> Process:
        """A new process."""
        made = Process(self, name)
        self.processes.append(made)
        return made

    def chance(self, probability: float) -> bool:
        """Whether something happens that does so with that probability."""
        return self.random.random() < probability

    # Time.

    def at(self, moment: float, action: Callable[[], object]) -> list[Callable[[], object]]:
        """Let something happen later; emptying what this gives calls it off."""
        timer = [action]
        self._count += 1
        heapq.heappush(self._timers, (moment, self._count, timer))
        return timer

    def run(self, done: Callable[[], bool], limit_s: float) -> None:
        """Let tasks run until all is done.

        Raises:
            Hang: It is not done at that time, or never will be.
            BaseException: What a task has failed with.
        """
        while not done():
            if self.ready:
                position = self.random.randrange(len(self.ready))
                self.ready[position], self.ready[-1] = self.ready[-1], self.ready[position]
                task = self.ready.pop()
                if not task.ended:
                    self.current = task
                    task.greenlet.switch()
                    self.current = None
                if self.failures:
                    raise self.failures[0]
            else:
                self._pass_time(limit_s)

    def _pass_time(self, limit_s: float) -> None:
        while self._timers:
            moment, _, timer = heapq.heappop(self._timers)
            if not timer:
                continue
            if moment > limit_s:
                break
            self.now = max(self.now, moment)
            timer.pop()()
            return
        waiting = [str(task) for process in self.processes if process.alive for task in process.tasks]
        raise Hang(f"Not done at {self.now:.0f} s of virtual time:\n  " + "\n  ".join(sorted(waiting)))

    # What tasks call.

    def sleep(self, seconds: float, what: str = "time to pass") -> None:
        """Let the present task wait."""
        self.wait([], what, seconds)

    def preempt(self) -> None:
        """Let others run first, now and then."""
        if self.random.random() < PREEMPTED and self.current is not None and self.current.process.alive:
            self.ready.append(self.current)
            self._leave("its turn")

    def wait(self, waiting: list[Task], what: str, timeout_s: float | None = None) -> bool:
        """Wait in a list until somebody wakes those in it; False after the time-out.

        Raises:
            Killed: The process has ended meanwhile.
        """
        task = self.current
        if task is None:
            raise RuntimeError(f"Only a task can wait for {what}.")
        if not task.process.alive:
            raise Killed
        waiting.append(task)
        timer = None
        if timeout_s is not None:
            timer = self.at(self.now + max(timeout_s, 0.0), lambda: self.let_go_on(task))
        self._leave(what)
        timed_out = timer is not None and not timer
        if timer:
            timer.clear()
        if task in waiting:
            waiting.remove(task)
            if not task.process.alive:
                raise Killed
            return not timed_out
        if not task.process.alive:
            raise Killed
        return True

    def _leave(self, what: str) -> None:
        task = self.current
        if task is None:
            raise RuntimeError("There is no task.")
        task.waits_for = what
        self.main.switch()
        task.waits_for = ""

    def let_go_on(self, task: Task) -> None:
        """Let a task have its turn, which may have it already."""
        if task not in self.ready and not task.ended:
            self.ready.append(task)

    def wake_all(self, waiting: list[Task]) -> None:
        """Let all go on that wait in a list."""
        for task in waiting:
            self.let_go_on(task)
        waiting.clear()

    def wake_one(self, waiting: list[Task]) -> None:
        """Let one of them go on."""
        if waiting:
            self.let_go_on(waiting.pop(self.random.randrange(len(waiting))))
