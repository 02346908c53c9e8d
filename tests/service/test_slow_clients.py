"""Clients whose one message is long on its way: how long they are waited for, and who gives way to whom."""

import re
from contextlib import ExitStack

import optserve
from optserve_server.edge.gate.interceptors import ARRIVING, PROTECTED
from service.attacks import SERVICE, Raw, attempted, framed, raw, used, wait_until
from service.worker_harness import config_of

INFO, STEPS = SERVICE + "GetServerInfo", SERVICE + "StreamSteps"
MESSAGE = framed(b"")
"""Of GetServerInfo; its parts stand for those of a large one."""

OK, CANCELLED, EXHAUSTED = 0, 1, 8


def begun(connection: Raw) -> int:
    """A call whose message is under way."""
    call = connection.call(INFO)
    # It may have been refused by now.
    attempted(lambda: connection.send(call, MESSAGE[:3]))
    return call


def test_a_unary_message_may_take_as_long_as_the_largest_one_at_the_slowest_rate(tmp_path):
    """Below 420 kB/s a message of 4 MB could never arrive."""
    with (
        optserve.local_server(backend="numpy", options=config_of(tmp_path, receive_s=0.5)) as server,
        raw(server.target) as (slow,),
    ):
        call = begun(slow)
        opened = slow.call(STEPS)
        wait_until(lambda: opened in slow.statuses)
        # A stream begins with a small message, and has been waited for as long as that may take.
        code, words = slow.statuses[opened]
        assert code == CANCELLED
        assert "longer than it may take" in words
        slow.send(call, MESSAGE[3:])
        wait_until(lambda: call in slow.statuses)
        assert slow.statuses[call] == (OK, "")


def test_a_unary_message_that_takes_longer_is_not_waited_for_and_its_client_is_told(tmp_path):
    options = config_of(tmp_path, receive_s=0.1, max_message_bytes=64 << 10)  # which take a second
    with optserve.local_server(backend="numpy", options=options) as server, raw(server.target) as (slow,):
        call = begun(slow)
        wait_until(lambda: call in slow.statuses)
        code, words = slow.statuses[call]
        assert code == CANCELLED
        told = re.fullmatch(
            r"The server has waited ([\d.]+) s for this call's client, and that is longer than it may take\.", words
        )
        assert told
        assert float(told[1]) >= 1.0


def test_of_many_slow_clients_those_that_came_first_come_to_an_end_and_others_find_places_soon(tmp_path):
    """Each newcomer had the one that was nearest to its end begin anew, for ever."""
    with optserve.local_server(backend="numpy") as server, ExitStack() as stack:
        threads = used(server).threads
        connections: list[Raw] = []
        calls: list[int] = []

        def come(count: int) -> None:
            connections.extend(stack.enter_context(raw(server.target, count)))
            calls.extend(begun(connection) for connection in connections[len(calls) :])

        def status(number: int) -> int | None:
            return connections[number].statuses.get(calls[number], (None, ""))[0]

        # Each has a thread while it waits.
        come(PROTECTED)
        wait_until(lambda: used(server).threads >= threads + PROTECTED)
        come(ARRIVING - PROTECTED)
        wait_until(lambda: used(server).threads >= threads + ARRIVING)
        come(1)
        wait_until(lambda: status(ARRIVING) is not None)
        assert status(ARRIVING) == EXHAUSTED

        def some_gave_way() -> bool:
            come(1)
            return sum(status(number) == CANCELLED for number in range(len(calls))) >= 3

        wait_until(some_gave_way)
        assert "another call needed its place" in next(
            connection.statuses[call][1]
            for connection, call in zip(connections, calls, strict=True)
            if connection.statuses.get(call, (OK, ""))[0] == CANCELLED
        )
        # Another client, whose message is there at once, finds a place as well.
        with optserve.connect(server.target) as client:
            assert client.server_info().backend == "numpy"
        assert [status(number) for number in range(PROTECTED)] == [None] * PROTECTED
        for connection, call in list(zip(connections, calls, strict=True))[:PROTECTED]:
            connection.send(call, MESSAGE[3:])
        wait_until(lambda: all(status(number) == OK for number in range(PROTECTED)))
