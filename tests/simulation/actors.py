"""Those who use the service in a run: clients and workers, which are the real client code, and one who is rude."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import grpc
import numpy as np

import optserve
from optserve._common import wire
from optserve._rpc.connection import Connection
from optserve.optimizer import ReplyName
from optserve.v1 import replicas_pb2, steps_pb2

from .channel import Channel
from .clock import VirtualClock
from .model import Attempt, Broken, Fate
from .world import Process

if TYPE_CHECKING:
    from .run import Run

NAME = "model"
CONFIG = optserve.ClientConfig(
    transport="grpc", keep_freed_memory=False, connect_timeout_s=5.0, timeout_s=8.0, step_timeout_s=60.0
)
SERVICE = "/optserve.v1.OptimizerService"

STORM_ATTEMPTS = 50
"""Tries while things go wrong; others are left for afterwards."""

LATEST_S = 5.0
"""How much later than its time-out a call may end."""

PASSING = (optserve.UnavailableError, optserve.DeadlineExceededError)

_T = TypeVar("_T")


class Actor:
    """Somebody with a process, in which it lives until it is killed, or has done what it came for.

    Args:
        run: The run that it is part of.
        name: Its name, and that of the worker that it is.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.world = run.world
        self.name = name
        self.process: Process | None = None
        self.lives = 0
        self.final_steps = 0
        self.has_left = False
        self._channels: list[Channel] = []

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Begin a life."""
        self.lives += 1
        self.world.log(lambda: f"life {self.lives} of {self.name} begins")
        self.process = self.world.process(f"{self.name} {self.lives}")
        self.process.start(self._live, "main")

    def kill(self) -> None:
        """End it; what it has sent may still arrive."""
        if self.process is not None and self.process.alive:
            self.world.log(lambda: f"{self.name} is killed")
            self.process.kill()
            for channel in self._channels:
                if channel.process is self.process:
                    channel.lose()

    def _live(self) -> None:
        with self._connected() as client:
            self._act(client)
        self.world.log(lambda: f"{self.name} has done")
        self.has_left = True

    def _act(self, client: optserve.Client) -> None:
        raise NotImplementedError

    def _connected(self) -> optserve.Client:
        return self.persist("connect", lambda: optserve.Client("sim", CONFIG, self._connection()))

    def _connection(self) -> Connection:
        channel = self._channel()
        return Connection("sim", CONFIG, VirtualClock(self._present), channel)

    def _channel(self) -> Channel:
        channel = Channel(self.run.network, self._present)
        self._channels.append(channel)
        return channel

    @property
    def _present(self) -> Process:
        """The process of the task that asks, which may be an earlier life's."""
        task = self.world.current
        if task is None:
            raise RuntimeError("There is no task.")
        return task.process

    def timed(self, what: str, timeout_s: float, call: Callable[[], _T]) -> _T:
        """Make a call, which must end within its time-out."""
        began = self.world.now
        try:
            return call()
        finally:
            took = self.world.now - began
            if took > timeout_s + LATEST_S and self._present.alive:
                self.run.fail(
                    Broken(f"{self.name} has waited {took:.0f} s for {what}, with a time-out of {timeout_s:.0f} s.")
                )

    def persist(self, what: str, call: Callable[[], _T]) -> _T:
        """Make a call until it succeeds."""
        while True:
            try:
                return self.timed(what, CONFIG.step_timeout_s, call)
            except optserve.OptserveError as error:
                if not isinstance(error, PASSING) and error.retry_after_s is None:
                    raise
                self.world.log(lambda error=error: f"{self.name}: {what}: {error}")
                self.world.sleep(self.world.random.uniform(0.05, 1.0))

    def think(self) -> None:
        """Let time pass between two steps."""
        self.world.sleep(self.world.random.uniform(0.0, self.run.scenario.thinking_s))

    def step_timeout_s(self) -> float:
        """For one step: now and then a short one."""
        if self.run.is_calm or self.world.chance(0.8):
            return 30.0
        return self.world.random.uniform(0.05, 3.0)

    def may_try(self) -> bool:
        """Whether to make another step; afterwards, in the calm, until all have made some."""
        while not self.run.is_calm and len(self.run.model.attempts) >= STORM_ATTEMPTS:
            self.world.sleep(1.0, "the calm")
        if not self.run.model.has_room:
            return False
        return not self.run.is_calm or not self.run.has_settled()

    def settle(self, attempt: Attempt, fate: Fate, why: object) -> None:
        """Note what became of a try that has not returned."""
        attempt.fate = fate
        self.world.log(lambda: f"{self.name}: try {attempt.number} {fate.name}: {why}")


class Client(Actor):
    """The only client of an optimizer whose parameters the server holds."""

    reply: ReplyName = "parameters"

    def _act(self, client: optserve.Client) -> None:
        opt = self.run.made(self, client)
        while self.may_try():
            attempt = self.run.model.begin(self.name)
            timeout_s = self.step_timeout_s()
            attempt.added = tuple(name for name in opt._model.names if name in self.run.added)
            gradient, own = self.run.model.gradient(attempt), self.run.model.hyperparameters(attempt)
            given = [own] * (len(opt._known.groups) + 1) if own and self.world.chance(0.5) else own
            try:
                options = {"reply": self.reply, "partial": True, "hyperparameters": given, "timeout_s": timeout_s}
                step = partial(opt.step, gradient, **options)
                x = self.timed("a step", timeout_s, step)
            except optserve.StepInDoubtError as error:
                self.settle(attempt, Fate.IN_DOUBT, error)
                self.persist("refresh", opt.refresh)
            except optserve.EtagMismatchError as error:
                if self.lives == 1 and not self.run.is_in_doubt:
                    raise
                # What was in doubt, or what another life has sent, was added since, with a group of its own.
                self.settle(attempt, Fate.IN_DOUBT, error)
                self.persist("refresh", opt.refresh)
            except optserve.WrongStepError as error:
                if self.lives == 1 and not self.run.has_rude_clients:
                    raise
                # What a life before has sent has arrived.
                self.settle(attempt, Fate.REFUSED, error)
                self.persist("refresh", opt.refresh)
            except (optserve.StateReplacedError, optserve.StepsLostError) as error:
                if self.lives == 1 or not self.run.history.is_lost:
                    raise
                # A restore that a life before has sent has arrived.
                self.settle(attempt, Fate.IN_DOUBT, error)
                self.persist("refresh", opt.refresh)
            # Of another client, or of what a broken connection still brings, until its time was up.
            except (*PASSING, optserve.StepInProgressError) as error:
                self.settle(attempt, Fate.IN_DOUBT, error)
            else:
                self.run.returned(self, attempt, opt.current_step, x)
                self._after(opt)
            if self.world.chance(0.1):
                self._add(opt)
            self.think()

    def _add(self, opt: optserve.Optimizer) -> None:
        """Add a parameter, perhaps with a group of its own."""
        added = self.run.add()
        groups = [optserve.Group([added.name])] if self.world.chance(0.5) else []
        timeout_s = self.step_timeout_s()
        add = partial(opt.add_parameters, {added.name: added.value}, groups=groups, timeout_s=timeout_s)
        try:
            self.timed("an addition", timeout_s, add)
        except (optserve.StateReplacedError, optserve.StepsLostError):
            # Likewise.
            if self.lives == 1 or not self.run.history.is_lost:
                raise
            added.fate = Fate.IN_DOUBT
            self.persist("refresh", opt.refresh)
        except (*PASSING, optserve.StepInProgressError) as error:
            told = str(error)
            self.world.log(lambda: f"{self.name}: {added.name}: {told}")
            added.fate = Fate.IN_DOUBT
            self.persist("refresh", opt.refresh)
        else:
            self.world.log(lambda: f"{self.name} has added {added.name}")
            added.fate = Fate.RETURNED

    def _after(self, opt: optserve.Optimizer) -> None:
        """A step has returned."""


class DeltaClient(Client):
    """One that holds its parameters itself, with a method whose state depends on all steps, and checkpoints of it."""

    reply: ReplyName = "updates"

    def _after(self, opt: optserve.Optimizer) -> None:
        history = self.run.history
        if not history.is_certain or not self.world.chance(0.15):
            return
        known = tuple(opt._model.names)
        tags = history.tags(known)
        if not tags or self.world.chance(0.6):
            self._save(opt, f"tag-{len(history.attempts)}", known)
        else:
            self._restore(opt, self.world.random.choice(tags))

    def _save(self, opt: optserve.Optimizer, tag: str, known: tuple[str, ...]) -> None:
        try:
            self.timed("a checkpoint", CONFIG.step_timeout_s, lambda: opt.save_checkpoint(tag))
        except PASSING as error:
            told = str(error)
            self.world.log(lambda: f"{self.name}: {tag}: {told}")
        else:
            self.world.log(lambda: f"{self.name} has saved {tag}")
            self.run.history.saved(tag, known)

    def _restore(self, opt: optserve.Optimizer, tag: str) -> None:
        history = self.run.history
        # Until it is known.
        history.is_lost = True
        try:
            self.timed("a restore", CONFIG.step_timeout_s, lambda: opt.restore_checkpoint(tag))
        except PASSING as error:
            told = str(error)
            self.world.log(lambda: f"{self.name}: the restore of {tag}: {told}")
            self.persist("refresh", opt.refresh)
        except optserve.FailedPreconditionError as error:
            # What was in doubt has been added, before the checkpoint was taken or since.
            if error.reason != "CHECKPOINT_MISMATCH" or not self.run.is_in_doubt:
                raise
            history.is_lost = False
        else:
            self.world.log(lambda: f"{self.name} has restored {tag}")
            history.is_lost = False
            history.restored(tag)


class Worker(Actor):
    """One of several workers."""

    def _act(self, client: optserve.Client) -> None:
        self.run.made(self, client)
        try:
            with ExitStack() as stack:
                worker = self.persist("enter", lambda: stack.enter_context(client.worker(NAME, self.name)))
                self.run.entered(self)
                self._work(worker)
        except optserve.WorkerReplacedError as error:
            told = str(error)
            self.world.log(lambda: f"{self.name}: {told}")

    def _work(self, worker: optserve.Worker) -> None:
        self.persist("pull", worker.pull)
        while self.may_try():
            attempt = self.run.model.begin(self.name)
            timeout_s = self.step_timeout_s()
            gradient, own = self.run.model.gradient(attempt), self.run.model.hyperparameters(attempt)
            try:
                step = partial(worker.step, gradient, reply="parameters", hyperparameters=own, timeout_s=timeout_s)
                x = self.timed("a step", timeout_s, step)
            except (optserve.GradientLateError, optserve.TooFewWorkersError) as error:
                self.settle(attempt, Fate.REFUSED, error)
                self.persist("pull", worker.pull)
            except optserve.WorkerReplacedError as error:
                self.settle(attempt, Fate.REFUSED, error)
                raise
            except optserve.StepInDoubtError as error:
                self.settle(attempt, Fate.IN_DOUBT, error)
                self.persist("refresh", worker.refresh)
                self.persist("pull", worker.pull)
            except PASSING as error:
                self.settle(attempt, Fate.IN_DOUBT, error)
            else:
                self.run.returned(self, attempt, worker.at_step or 0, x)
            self.think()


class Rude(Actor):
    """Sends whole gradients and ends its stream without a commit: none of them may be applied."""

    def _act(self, client: optserve.Client) -> None:
        self.run.made(self, client)
        channel = self._channel()
        while self.may_try() and not self.run.is_calm:
            attempt = self.run.model.begin(self.name)
            attempt.fate = Fate.REFUSED
            if self.run.scenario.has_workers:
                request = replicas_pb2.ReportWorkerRequest(
                    name=f"optimizers/{NAME}", worker=self.name, state=replicas_pb2.WORKER_STATE_ALIVE
                )
                report = channel.unary_unary(
                    f"{SERVICE}/ReportWorker",
                    replicas_pb2.ReportWorkerRequest.SerializeToString,
                    replicas_pb2.ReportWorkerResponse.FromString,
                )
                try:
                    report(request, timeout=5.0)
                except grpc.RpcError:
                    continue
            call = channel.stream_stream(f"{SERVICE}/StreamSteps")(self._messages(attempt))
            try:
                for _ in call:
                    pass
            except grpc.RpcError:
                pass
            self.think()

    def _messages(self, attempt: Attempt) -> Iterator[bytes]:
        worker = self.name if self.run.scenario.has_workers else ""
        request = steps_pb2.StreamStepsRequest()
        request.open.name, request.open.worker = f"optimizers/{NAME}", worker
        yield wire.encode(request)
        gradient = self.run.model.gradient(attempt)
        request = steps_pb2.StreamStepsRequest()
        request.begin.request_id = f"rude-{attempt.number}"
        request.chunk.SetInParent()
        yield wire.encode(request, b"".join(np.ascontiguousarray(array).tobytes() for array in gradient.values()))
