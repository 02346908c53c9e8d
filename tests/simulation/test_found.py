"""Faults that the simulation has found, each in the few moves that it takes, in the orders that these can have."""

import errno
from contextlib import ExitStack, suppress
from functools import partial

import numpy as np
import pytest

import optserve
from optserve_server.engine.record_encoding import STEPPED
from optserve_server.persistence.journal import Journal, Reader
from simulation.disk import SimulatedDisk
from simulation.scene import Scene, hosted, persistently, scene
from simulation.world import World


def test_a_data_folder_that_was_just_made_outlives_a_power_failure(tmp_path):
    for seed in range(100):
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", hosted))
            there.restart(power=True)
            there.play(there.let("finder", lambda client: client.optimizer("a")))


def test_of_several_who_make_one_optimizer_at_once_none_fails(tmp_path):
    """One was told that the parameters are in place already, where another one had found and uploaded them."""
    for seed in range(100):
        with scene(seed, tmp_path) as there:
            there.network.weather.slowest_s, there.network.weather.breaking = 0.3, 0.25
            there.play(*(there.let(f"maker {number}", hosted) for number in range(3)))


@pytest.mark.parametrize("seed", range(20))
def test_who_comes_while_another_one_fails_to_make_an_optimizer_makes_it(tmp_path, seed):
    """It was told that there is one of that name, and then that there is none."""
    with scene(seed, tmp_path) as there:
        faults = there.disk.faults
        there.world.at(0.1, lambda: vars(faults).update(failing=0.3, slowest_s=0.3))
        there.world.at(3.0, lambda: vars(faults).update(failing=0.0))
        there.play(*(there.let(f"maker {number}", hosted) for number in range(3)))


def test_a_worker_that_is_replaced_while_it_registers_is_not_told_that_its_step_was_not_applied(tmp_path):
    replaced: list[str] = []
    for seed in range(150):
        told: list[str] = []
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", hosted))
            _replace_while_it_registers(there, told)
            replaced += told
            applied = _is_applied(there)
        assert told != ["WorkerReplacedError"] or not applied, f"seed {seed}"
    assert set(replaced) == {"StepInDoubtError", "WorkerReplacedError"}


def test_a_step_ends_at_its_time_out_also_where_its_worker_has_to_register(tmp_path):
    for seed in range(30):
        took: list[float] = []
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", hosted))
            there.play(there.let("worker", partial(_step_without_answers, there, took)))
        assert max(took) < STEP_S + 1.0, f"seed {seed}"


def test_a_step_ends_at_its_time_out_also_where_its_reply_is_lost_and_no_parameters_come(tmp_path):
    """It read the parameters in place of the reply for as long as other calls may take."""
    took: list[float] = []
    for seed in range(200):
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", hosted))
            there.play(there.let("worker", partial(_step_whose_reply_is_lost, there, took)))
    assert max(took) < STEP_S + 1.0, f"seed {took.index(max(took))}"


def _step_whose_reply_is_lost(there: Scene, took: list[float], client: optserve.Client) -> None:
    with ExitStack() as stack:
        worker = persistently(there, lambda: stack.enter_context(client.worker("a", "w")))
        persistently(there, worker.pull)
        there.network.weather.slowest_s = 0.2
        lost = there.world.now + there.world.random.uniform(0.2, 0.6)
        there.world.at(lost, there.channels["worker"].lose)
        there.world.at(lost, lambda: there.restart(power=False))
        there.world.at(lost + there.world.random.uniform(0.2, 1.0), there.silence)
        began = there.world.now
        with suppress(optserve.OptserveError):
            worker.step({"w": np.zeros(4)}, timeout_s=STEP_S)
        took.append(there.world.now - began)
        there.network.weather.slowest_s = 0.0


def test_a_step_whose_time_is_up_raises_what_its_documentation_says(tmp_path):
    """It raised what the client was about to act on: that a stream that was given up had been opened after its own, and
    that its worker had to register."""
    told: list[optserve.OptserveError] = []
    for seed in range(60):
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", hosted))
            there.network.weather.slowest_s, there.network.weather.lingering_s = 0.5, 5.0
            there.network.weather.breaking = 0.1
            there.play(there.let("worker", partial(_step_in_haste, there, told)))
    documented = optserve.DeadlineExceededError, optserve.StepInDoubtError, optserve.UnavailableError
    assert not [error for error in told if not isinstance(error, documented)]
    words = {error.message for error in told if isinstance(error, optserve.DeadlineExceededError)}
    for of_the_client in "has opened another stream since", "report it alive":
        assert any(of_the_client in some for some in words)


def _step_in_haste(there: Scene, told: list[optserve.OptserveError], client: optserve.Client) -> None:
    with ExitStack() as stack:
        worker = persistently(there, lambda: stack.enter_context(client.worker("a", "w")))
        persistently(there, worker.pull)
        for _ in range(10):
            try:
                worker.step({"w": np.zeros(4)}, timeout_s=there.world.random.uniform(0.5, 3.0))
            except optserve.OptserveError as error:
                told.append(error)
                if isinstance(error, optserve.StepInDoubtError):
                    persistently(there, worker.refresh)
            if there.world.chance(0.1):
                there.restart(power=False)


STEP_S = 2.0


def _step_without_answers(there: Scene, took: list[float], client: optserve.Client) -> None:
    """The server starts anew, knows the worker no longer, says so, and then is not heard of any more."""
    with client.worker("a", "w") as worker:
        worker.pull()
        there.restart(power=False)
        there.world.at(there.world.now + there.world.random.uniform(0.05, 0.3), there.silence)
        for _ in range(20):
            began = there.world.now
            with suppress(optserve.OptserveError):
                worker.step({"w": np.zeros(4)}, timeout_s=STEP_S)
            took.append(there.world.now - began)


def _is_applied(there: Scene) -> bool:
    found: list[np.ndarray] = []
    there.play(there.let("looks", lambda client: found.append(client.optimizer("a").pull_parameters().arrays["w"])))
    return found[0][0] != 0


def _is_kept_and_refused(there: Scene) -> bool:
    """Whether the disk refuses for the rest of a test, or works again half a second before a step's time is up."""
    there.disk.refuses = True
    lasts = there.world.chance(0.5)
    if not lasts:
        there.world.at(there.world.now + STEP_S - 0.5, lambda: setattr(there.disk, "refuses", False))
    return lasts


def _restart_with_a_disk_that_works(there: Scene) -> None:
    there.disk.refuses = False
    there.restart(power=False)


def test_a_step_that_may_be_found_on_the_disk_is_refused_for_no_other_reason(tmp_path):
    """Its gradient was written with another worker's, whose commit was refused; then there were too few workers."""
    reasons: set[tuple[str, bool]] = set()
    for seed in range(40):
        told: list[optserve.OptserveError] = []
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", partial(hosted, consistency=optserve.Sync(workers=2, lease_s=1.0))))
            _refuse_two_of_whom_one_goes(there, told)
            _restart_with_a_disk_that_works(there)
            applied = _is_applied(there)
        (error,) = told
        reasons.add((error.reason, applied))
        leaves_open = isinstance(error, optserve.DeadlineExceededError) or "in_doubt" in error.metadata
        assert leaves_open or not applied, f"seed {seed}: {error}"
    assert reasons >= {("NOT_DURABLE", True), ("TOO_FEW_WORKERS", False)}


def _refuse_two_of_whom_one_goes(there: Scene, told: list[optserve.OptserveError]) -> None:
    world = there.world
    here: set[str] = set()

    def act(name: str, client: optserve.Client) -> None:
        with client.worker("a", name) as worker:
            worker.pull()
            here.add(name)
            while len(here) < 2:
                world.sleep(0.01)
            if name == "stays":
                _is_kept_and_refused(there)
                world.at(world.now + world.random.uniform(0.1, 0.5), there.channels["goes"].process.kill)
            else:
                world.sleep(world.random.uniform(0.0, 0.05))
            try:
                worker.step({"w": np.array([1.0, 0, 0, 0])}, timeout_s=STEP_S)
            except optserve.OptserveError as error:
                told.append(error)

    goes = there.let("goes", partial(act, "goes"))
    there.play(goes, there.let("stays", partial(act, "stays")))


def test_a_refused_step_that_a_restart_finds_on_the_disk_is_not_made_twice_without_a_word(tmp_path):
    found = 0
    for seed in range(20):
        with scene(seed, tmp_path, snapshot_bytes=1) as there:
            there.play(there.let("maker", hosted))
            there.play(there.let("worker", partial(_step_again_after_a_restart, there)))
            found += _is_applied(there)
    assert 0 < found < 20


def _step_again_after_a_restart(there: Scene, client: optserve.Client) -> None:
    with client.worker("a", "w") as worker:
        worker.pull()
        for _ in range(4):
            worker.step({"w": np.zeros(4)})
            # A snapshot is taken, so that no other one is due when the disk works again.
            there.world.sleep(2.0)
        lasts = _is_kept_and_refused(there)
        gradient = {"w": np.array([1.0, 0, 0, 0])}
        with pytest.raises(optserve.UnavailableError, match="refuses to remove its record"):
            worker.step(gradient, timeout_s=0.3)
        # The server cuts it when the disk lets it, though nothing else is to be written.
        there.world.sleep(STEP_S + 2.0)
        _restart_with_a_disk_that_works(there)
        there.world.sleep(0.5)
        if lasts:
            with pytest.raises(optserve.StepInDoubtError, match="was applied"):
                worker.step(gradient, timeout_s=STEP_S)
        else:
            worker.step({"w": np.zeros(4)}, timeout_s=STEP_S)


class StubbornDisk(SimulatedDisk):
    """A failing one of these does not cut files either."""

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        if self.faults.failing:
            raise OSError(errno.EIO, "Input/output error")
        super().truncate(descriptor, size_bytes)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_failed_sync_has_left_in_the_cache_is_durable_once_a_start_has_read_it(tmp_path, seed):
    """The system takes it for written after the failure, so that a sync alone does nothing."""
    disk = StubbornDisk(World(seed), tmp_path)
    journal = Journal(tmp_path, 1, 8192, disk=disk)
    journal.append(STEPPED, b"", [b"a" * 1000])
    disk.faults.failing = 1.0
    with pytest.raises(OSError, match="Input/output error"):
        journal.append(STEPPED, b"", [b"b" * 1000])
    disk.crash(power=False)
    disk.faults.failing = 0.0
    assert [record.lsn for record in Reader(tmp_path, 0)] == [1, 2]
    Journal(tmp_path, 3, 8192, disk=disk)
    disk.crash(power=True)
    assert [record.lsn for record in Reader(tmp_path, 0)] == [1, 2]


def _replace_while_it_registers(there: Scene, told: list[str]) -> None:
    """A worker's step is applied, its reply lost with the server, and its name taken by another life meanwhile."""
    world = there.world

    def first(client: optserve.Client) -> None:
        with client.worker("a", "w") as worker:
            worker.pull()
            # The reply is lost.
            world.at(world.now + world.random.uniform(0.02, 0.08), lambda: there.restart(power=False))
            there.network.weather.slowest_s = 0.02
            try:
                worker.step({"w": np.array([1.0, 0, 0, 0])}, timeout_s=20.0)
            except optserve.OptserveError as error:
                told.append(type(error).__name__)

    def second(client: optserve.Client) -> None:
        while there.server.starts < 2:
            world.sleep(0.01)
        world.sleep(world.random.uniform(0.0, 0.3))
        with client.worker("a", "w"):
            world.sleep(1.0)

    there.play(there.let("first", first), there.let("second", second))
    there.network.weather.slowest_s = 0.005
