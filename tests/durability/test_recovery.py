"""What a server finds in its data folder when it starts again, bit for bit."""

from dataclasses import replace

import pytest

from durability.folder import F4, F8, MIB, PARAMETERS, BusyDisk, Server, fingerprint, step
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta, Momentum, WindowedRms
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.step_settings import Change, StepSettings


def test_everything_comes_back_bit_for_bit_without_any_snapshot(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(4):
        reply = step(item, index)
    server.optimizers.update("a", lambda before, _layout: Settings(replace(before.rule, rho=0.5)))
    reply = step(item, 4, (1,))
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    item = again.optimizers.get("a")
    assert fingerprint(item) == before
    assert again.recovered.steps == 5
    replayed = item.steps.begin(StepRequest("request-4", 4))
    assert replayed.commit().replayed
    assert b"".join(replayed.reply(MIB, lambda piece: bytes(piece.data))) == reply
    replayed.close()
    assert again.create() is item  # a retried creation finds what it made
    again.die()


@pytest.mark.parametrize("kind", ["value", "norm", "global_norm"])
def test_what_was_clipped_is_clipped_again_also_behind_an_empty_parameter_of_another_dtype(tmp_path, kind):
    server = Server(tmp_path)
    layout = Layout((PARAMETERS[1], Parameter("first", (3,), F4), PARAMETERS[2], Parameter("last", (5,), F8)))
    item = server.optimizers.create("a", layout, Settings(Adadelta(), clipping=Clipping(kind, 0.1)))
    step(item, 0)
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


@pytest.mark.parametrize(
    ("settings", "own", "change"),
    [
        pytest.param(
            Settings(Adadelta(), groups=(Group((0,), {"learning_rate": 0.5}),)),
            Change(1, {"learning_rate": 0.25}),
            lambda settings: replace(settings, groups=()),
            id="the group is removed",
        ),
        pytest.param(
            Settings(WindowedRms(eps=0.0, outer_eps=1e-8)),
            Change(None, {"eps": 0.0}),
            lambda settings: replace(settings, rule=replace(settings.rule, eps=1e-8, outer_eps=0.0)),
            id="the settings exclude each other",
        ),
    ],
)
def test_settings_that_fit_no_longer_are_no_obstacle_if_the_snapshot_contains_their_step(
    tmp_path, settings, own, change
):
    """The step and the update happen between the snapshot's LSN and the description of their optimizer."""
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    server.create("a")
    item = server.optimizers.create("b", Layout(PARAMETERS), settings, "creation")

    def act(number: int) -> None:
        if number == 1:
            step(item, 0, settings=StepSettings((own,)))
            server.optimizers.update("b", lambda before, _layout: change(before))

    disk.act = act
    server.folder.snapshot()
    disk.act = None
    step(item, 1)
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("b")) == before
    again.die()


def test_minus_0_in_the_settings_of_a_step_is_0_before_and_after_a_kill(tmp_path):
    """The server that goes on has made a step with 0 before; the one that comes back begins after that."""
    server = Server(tmp_path)
    item = server.optimizers.create("a", Layout(PARAMETERS), Settings(Momentum()), "creation")

    def own(zero: float) -> StepSettings:
        return StepSettings((Change(None, {"rho": zero, "learning_rate": zero}),))

    step(item, 0, settings=own(0.0))
    step(item, 1)
    server.folder.snapshot()
    step(item, 2, settings=own(-0.0))
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()
