"""One run: what a seed makes happen, and what must be true of it."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import optserve
from optserve_server.engine.optimizer import Optimizer
from optserve_server.numerics.layout import Layout

from .actors import NAME, Actor, Client, DeltaClient, Rude, Worker
from .disk import Faults, SimulatedDisk
from .history import ADDED, SHAPES, History, arrays_of
from .model import MAX_ATTEMPTS, Added, Attempt, Broken, Fate, Model
from .network import Network, Weather
from .scenario import Scenario
from .service import Server
from .world import World

SETTLED_AFTER_S = 120.0
"""After so long in the calm everybody who lives has made steps: leases, idle steps and time-outs have ended."""

LINGERING_S = 60.0
"""After so long no message is under way any more."""

LIMIT_S = 1200.0
"""Of virtual time: then something waits for ever."""


class Run:
    """One run.

    Args:
        seed: Of everything.
        root: An empty folder for the disk.
        trace: Told what happens.

    Attributes:
        is_calm: Nothing goes wrong any more.
    """

    def __init__(self, seed: int, root: Path, trace: Callable[[str], object] | None = None) -> None:
        self.world = world = World(seed, trace)
        self.scenario = scenario = Scenario.drawn(world.random)
        world.log(lambda: f"{scenario}")
        self.history = History()
        self.model = self.history if scenario.kind == "delta" else Model(scenario.needed, scenario.kind != "sync")
        self.network = Network(world)
        self.disk = SimulatedDisk(world, root)
        self.server = Server(world, self.network, self.disk, snapshot_bytes=4096, segment_bytes=8192)
        self.is_calm = False
        kind = Worker if scenario.has_workers else DeltaClient if scenario.kind == "delta" else Client
        self.actors: list[Actor] = [kind(self, f"w{position}") for position in range(scenario.actors)]
        self.has_rude_clients = scenario.kind in ("client", "async") and world.chance(0.3)
        self.rude = [Rude(self, "rude")] if self.has_rude_clients else []
        self.added: dict[str, Added] = {}
        self._calm_at = 0.0
        self._settled = False
        self._entered: set[str] = set()

    # What actors tell.

    def fail(self, error: BaseException) -> None:
        """Something is wrong."""
        self.world.failures.append(error)

    def made(self, actor: Actor, client: optserve.Client) -> optserve.Optimizer:
        """The optimizer, which the first who comes makes."""
        make = partial(self._made_or_found, client)
        if self.scenario.kind == "delta":
            specs = {name: np.zeros(shape, dtype) for name, (shape, dtype) in SHAPES.items()}
            return actor.persist("an optimizer", lambda: make(NAME, optserve.Adadelta(rho=0.9, eps=1e-6), specs))
        x = {"w": np.zeros(MAX_ATTEMPTS), "b": np.zeros(2, np.float32)}
        sgd, consistency = optserve.Sgd(learning_rate=1.0), self.scenario.consistency
        return actor.persist("an optimizer", lambda: make(NAME, sgd, x, hosted=True, consistency=consistency))

    def _made_or_found(self, client: optserve.Client, *model: Any, **settings: Any) -> optserve.Optimizer:
        try:
            return client.get_or_create_optimizer(*model, **settings)
        except optserve.InvalidArgumentError:
            # It has other parameters by now.
            if not self.added:
                raise
            return client.optimizer(NAME)

    def add(self) -> Added:
        """A parameter that somebody is about to add."""
        shape, dtype = ADDED
        added = Added(f"p{len(self.added)}", np.full(shape, len(self.added) + 0.5, dtype))
        self.added[added.name] = added
        return added

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is not known of some parameter whether it was added."""
        return any(added.fate is not Fate.RETURNED for added in self.added.values())

    def entered(self, actor: Actor) -> None:
        """A worker is there; where that matters, all wait for all."""
        self._entered.add(actor.name)
        while self.scenario.gentle and len(self._entered) < len(self.actors):
            self.world.sleep(0.01, "the other workers")

    def returned(self, actor: Actor, attempt: Attempt, step: int, x: dict[str, np.ndarray]) -> None:
        """A step has returned."""
        self.world.log(lambda: f"{actor.name}: try {attempt.number} was step {step}")
        self.model.returned(attempt, step, x)
        self._check_staleness(actor, x)
        if self.is_calm:
            actor.final_steps += 1

    def _check_staleness(self, actor: Actor, x: dict[str, np.ndarray]) -> None:
        scenario = self.scenario
        # Whoever was away begins with the clock of the slowest, and whoever has left is not waited for.
        if scenario.kind != "bounded" or not scenario.gentle or self.server.starts > 1 or self._settled:
            return
        made = Counter({other.name: 0 for other in self.actors})
        made.update(self.model.attempts[position].who for position in np.flatnonzero(x["w"]))
        if made[actor.name] > min(made.values()) + scenario.staleness + 1:
            raise Broken(f"{actor.name} is too far ahead, at a staleness of {scenario.staleness}: {dict(made)}")

    def has_settled(self) -> bool:
        """Whether everybody who lives has made steps in the calm."""
        if self.world.now > self._calm_at + SETTLED_AFTER_S:
            made = {actor.name: actor.final_steps for actor in self.actors if actor.is_alive}
            self.fail(
                Broken(f"In {SETTLED_AFTER_S:.0f} s in which nothing went wrong, too few steps were made: {made}.")
            )
            return True
        if self.scenario.kind == "sync":
            self._settled |= sum(actor.final_steps for actor in self.actors) >= 2 * self.scenario.needed
        else:
            living = [actor for actor in self.actors if actor.is_alive and not actor.has_left]
            # More steps than those that one may make before it waits for one who stays away and was not behind.
            needed = self.scenario.staleness + 3
            self._settled |= all(actor.final_steps >= needed for actor in living)
        # Once they go, there are too few for more.
        return self._settled

    # What happens.

    def play(self) -> None:
        """Let it all happen, and check what has to be true."""
        world = self.world
        self.server.start()
        for actor in (*self.actors, *self.rude):
            world.at(world.random.uniform(0, 0.5), actor.start)
        god = world.process("fate")
        storm = god.start(self._storm, "storm")
        world.run(lambda: storm.ended, LIMIT_S)
        self._end_storm()
        world.run(lambda: all(actor.has_left or not actor.is_alive for actor in self.actors), self._calm_at + LIMIT_S)
        self._check_end()

    def _storm(self) -> None:
        """Things go wrong, one after the other."""
        world, rng = self.world, self.world.random
        world.sleep(rng.uniform(0.0, 1.0))
        until = world.now + self.scenario.storm_s
        while world.now < until:
            rng.choice((self._change_weather, self._change_faults, self._kill_server, self._kill_actor, self._lose))()
            world.sleep(rng.expovariate(1.0))
            if not self.server.is_alive:
                self._restart()

    def _change_weather(self) -> None:
        rng, weather = self.world.random, self.network.weather
        weather.slowest_s = rng.choice((0.001, 0.02, 0.5, 3.0))
        weather.breaking = rng.choice((0.0, 0.02, 0.1, 0.3))
        weather.lingering_s = rng.choice((0.0, 0.5, 5.0, 30.0))
        weather.twice = rng.choice((0.0, 0.0, 0.3))
        self.world.log(lambda: f"{weather}")

    def _change_faults(self) -> None:
        rng, faults = self.world.random, self.disk.faults
        faults.slowest_s = rng.choice((0.0001, 0.01, 0.5))
        faults.failing = rng.choice((0.0, 0.0, 0.05, 0.5))
        faults.full = rng.random() < 0.2
        faults.deadly = rng.choice((0.0, 0.0, 0.02, 0.1))
        self.world.log(lambda: f"{faults}")

    def _kill_server(self) -> None:
        if self.server.is_alive and not self.scenario.gentle:
            self.world.log(lambda: "the server is killed")
            self.server.kill(power=self.world.chance(0.5))

    def _restart(self) -> None:
        # It may have been killed by a call to the disk, of which nobody knows yet.
        self.server.kill(power=self.world.chance(0.5))
        self.world.sleep(self.world.random.choice((0.05, 0.5, 4.0)))
        self.server.start()

    def _kill_actor(self) -> None:
        rng = self.world.random
        actor = rng.choice((*self.actors, *self.rude))
        if self.scenario.gentle or not actor.process:
            return
        # The tries of two at once have no order.
        if rng.random() < 0.7 or self.scenario.kind == "delta":
            actor.kill()
        # Else its next life begins while it is still there.
        if rng.random() < 0.7:
            self.world.at(self.world.now + rng.uniform(0.0, 2.0), lambda: self._revive(actor))

    def _revive(self, actor: Actor) -> None:
        # It may have been killed twice, and is to be revived twice.
        is_one_too_many = self.scenario.kind == "delta" and actor.is_alive
        if not self.is_calm and not actor.has_left and not is_one_too_many:
            actor.start()

    def _lose(self) -> None:
        if self.network.channels:
            self.world.random.choice(self.network.channels).lose()

    def _end_storm(self) -> None:
        """Nothing goes wrong any more; whoever is needed is there."""
        world = self.world
        world.log(lambda: "calm")
        self.network.weather.__dict__.update(vars(Weather()))
        self.disk.faults.__dict__.update(vars(Faults()))
        self.is_calm, self._calm_at = True, world.now
        if not self.server.is_alive or world.chance(0.3):
            self.server.kill(power=world.chance(0.5))
            self.server.start()
        for actor in self.rude:
            actor.kill()
        # Where the others can go on without, one may stay away for ever.
        enough = len(self.actors) - 1 >= self.scenario.needed and self.scenario.has_workers
        missing = (
            world.random.choice(self.actors) if enough and not self.scenario.gentle and world.chance(0.5) else None
        )
        if missing is not None:
            missing.kill()
        for actor in self.actors:
            if actor is not missing and not actor.is_alive:
                actor.start()

    def _check_end(self) -> None:
        # What was sent by connections that broke has come by then.
        step, layout, arrays, before = self._look(LINGERING_S)
        self._check_added(layout)
        if isinstance(self.model, History):
            self.model.check_end(step, layout, arrays)
        else:
            w, b = (np.frombuffer(array, dtype) for array, dtype in zip(arrays, ("f8", "f4"), strict=True))
            self.model.check_end(step, {"w": w[:MAX_ATTEMPTS], "b": b})
            # Those that were added lie behind w, and no step has taken them.
            for item, value in zip(layout.parameters[2:], w[MAX_ATTEMPTS:].reshape(-1, 2), strict=True):
                if not np.array_equal(value, self.added[item.name].value):
                    raise Broken(f"{item.name} is {value}, and not what it was added with.")
        self.server.kill(power=True)
        self.server.start()
        _, _, _, after = self._look(0.0)
        different = [name for name in before if before[name] != after[name]]
        if different:
            was, now = ({name: found[name] for name in different if name != "arrays"} for found in (before, after))
            raise Broken(f"The state that was recovered at the end has other {different}: {now}, not {was}.")
        self.server.kill(power=False)
        for process in self.world.processes:
            process.kill()
        self.world.run(lambda: not any(process.tasks for process in self.world.processes), self.world.now + 1.0)

    def _check_added(self, layout: Layout) -> None:
        """Check that parameters were added once, and those that may have been, at most once."""
        names = [item.name for item in layout.parameters[2:]]
        certain = [added.name for added in self.added.values() if added.fate is Fate.RETURNED]
        missing = [name for name in certain if name not in names]
        if missing or len(set(names)) < len(names) or not set(names) <= self.added.keys():
            raise Broken(f"The added parameters are {names}; {certain} certainly were added.")

    def _look(self, after_s: float) -> tuple[int, Layout, list[bytes], dict[str, Any]]:
        """(step, parameters, arrays, fingerprint) of the optimizer after a while."""
        found: list[tuple[int, Layout, list[bytes], dict[str, Any]]] = []

        def look() -> None:
            self.world.sleep(after_s)
            while self.server.optimizers is None:
                self.world.sleep(0.01, "a server")
            item = self.server.optimizers.get(NAME)
            with item.steps.locked_state() as state:
                found.append((item.steps.step, item.layout, arrays_of(state), fingerprint(item)))

        self.world.process("observer").start(look, "looks")
        self.world.run(lambda: bool(found), self.world.now + LIMIT_S)
        return found[0]


def fingerprint(item: Optimizer) -> dict[str, Any]:
    """All that has to be there again after a crash."""
    steps = item.steps
    return {
        "step": steps.step,
        "lineage": steps.lineage,
        "etag": steps.etag,
        "placed_by": steps.placed_by,
        "parameters": item.layout.parameters,
        "replacements": list(item.replacements),
        # Without their clocks: when they come again they begin with that of the slowest.
        "workers": {name: known[1:] for name, known in steps.workers.registry.to_json().items()},
        "arrays": arrays_of(item.state),
    }


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """For the length of a with-block, what is drawn at random elsewhere comes from the seed, and nothing is logged."""
    state, real = random.getstate(), os.urandom
    drawn = random.Random(~seed)
    random.seed(seed)
    os.urandom = drawn.randbytes
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        logging.disable(disabled)
        os.urandom = real
        random.setstate(state)


def play(seed: int, trace: Callable[[str], object] | None = None) -> None:
    """Play the run of a seed.

    Raises:
        Exception: A promise was broken; a note says how to see it again.
    """
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    root = Path(tempfile.mkdtemp(prefix="optserve-simulation-", dir=folder))
    try:
        with deterministic(seed):
            # The folder has another name each time.
            Run(seed, root, None if trace is None else lambda text: trace(text.replace(str(root), ""))).play()
    except BaseException as error:
        error.add_note(f"seed {seed}; to see it again: python -m tests.simulation --seed {seed} --trace")
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)
