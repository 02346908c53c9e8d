"""Records of the journal: what they look like, that they are read as they were written, and what they change."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest

from durability.folder import F4, F8, Server, fingerprint, step
from golden.test_folder import FOLDERS, golden
from optserve_server.engine import records, transition
from optserve_server.engine.addition import NewParameters, addition
from optserve_server.engine.optimizer import OtherState
from optserve_server.engine.record_encoding import optimizer_of
from optserve_server.engine.records import (
    AdditionRecord,
    ArenaValues,
    CreationRecord,
    DeletionRecord,
    PlacementRecord,
    ReplacementRecord,
    UpdateRecord,
)
from optserve_server.engine.step_record import StepRecord, WorkerStep
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.consistency import AsyncConsistency, SyncConsistency
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payloads, Selection
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.step_settings import Change, StepOptions, StepSettings
from optserve_server.persistence import snapshot
from optserve_server.persistence.journal import Reader
from present import present

TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LAYOUT = Layout((Parameter("w", (2, 3), F4), Parameter("b", (2,), F8), Parameter("none", (0, 4), F4)))
SETTINGS = Settings(
    Adadelta(rho=0.9, eps=1e-5),
    clipping=Clipping("norm", 0.5),
    groups=(Group((1,), {"rho": 0.5}),),
    hosted=True,
    weight_decay=0.01,
    consistency=SyncConsistency(workers=2),
)
W, B = np.arange(6, dtype=F4), np.arange(2, dtype=F8)
ARENAS = [
    ArenaValues(dtype, array, np.full(size, array, dtype)) for array in range(3) for dtype, size in ((F8, 2), (F4, 6))
]
FOR_ALL = StepSettings((Change(None, {"rho": 0.5, "learning_rate": 0.25}),))
BY_GROUP = StepSettings((Change(0, {}, 0.5), Change(1, {"eps": 1.0}, 0.0)))
SETTINGS_TEXT = (
    '"rule": {"name": "adadelta", "rho": 0.9, "eps": 1e-05, "learning_rate": 1.0}, '
    '"clipping": {"kind": "norm", "bound": 0.5}, '
    '"groups": [{"parameters": [1], "overrides": {"rho": 0.5}, "weight_decay": null}], '
    '"hosted": true, "weight_decay": 0.01, '
    '"consistency": {"kind": "sync", "staleness": 0, "workers": 2, "backup_workers": 0, "lease_s": 30.0, '
    '"scale_by_staleness": false}'
)
TIME_TEXT = '"time": "2026-01-02T03:04:05.678901+00:00"'
WRITTEN = [
    (
        CreationRecord("a", LAYOUT, SETTINGS, "etag", "lineage", "request", TIME),
        1,
        f'{{"optimizer": "a", {SETTINGS_TEXT}, '
        '"parameters": [["w", [2, 3], "float32"], ["b", [2], "float64"], ["none", [0, 4], "float32"]], '
        f'"etag": "etag", "lineage": "lineage", "request_id": "request", {TIME_TEXT}}}',
    ),
    (
        UpdateRecord("a", SETTINGS, "etag", TIME),
        2,
        f'{{"optimizer": "a", {SETTINGS_TEXT}, "etag": "etag", {TIME_TEXT}}}',
    ),
    (DeletionRecord("a"), 3, '{"optimizer": "a"}'),
    (
        StepRecord("a", 7, "request", ALL, [W, B]),
        4,
        '{"optimizer": "a", "step": 7, "request_id": "request", "tensors": []}',
    ),
    (
        StepRecord(
            "a", 7, "", Selection((1, 2)), [B, -B], (WorkerStep("alice", "r-1", 3), WorkerStep("bob", "r-2", 4)), 5
        ),
        4,
        '{"optimizer": "a", "step": 7, "request_id": "", "tensors": [1, 2], '
        '"workers": [["alice", "r-1", 3], ["bob", "r-2", 4]], "staleness": 5}',
    ),
    (
        StepRecord("a", 7, "request", Selection((1,)), [B], settings=FOR_ALL),
        4,
        '{"optimizer": "a", "step": 7, "request_id": "request", '
        '"with": {"tensors": [1], "settings": [[null, {"rho": 0.5, "learning_rate": 0.25}, null]]}}',
    ),
    (
        StepRecord("a", 7, "", ALL, [W, B], (WorkerStep("alice", "r-1", 3),), 5, BY_GROUP),
        4,
        '{"optimizer": "a", "step": 7, "request_id": "", '
        '"with": {"tensors": [], "settings": [[0, {}, 0.5], [1, {"eps": 1.0}, 0.0]]}, '
        '"workers": [["alice", "r-1", 3]], "staleness": 5}',
    ),
    (
        StepRecord("a", 0, "r", Selection((2,)), []),
        4,
        '{"optimizer": "a", "step": 0, "request_id": "r", "tensors": [2]}',
    ),
    (
        ReplacementRecord("a", 7, SETTINGS, "etag", "lineage", "request", TIME, ARENAS, "upload", "checkpoint two"),
        5,
        f'{{"optimizer": "a", "step": 7, {SETTINGS_TEXT}, "etag": "etag", "lineage": "lineage", '
        f'"request_id": "request", {TIME_TEXT}, "placed_by": "upload", "target": "checkpoint two"}}',
    ),
    (PlacementRecord("a", "request", [W, B]), 6, '{"optimizer": "a", "request_id": "request"}'),
    (
        AdditionRecord(
            "a",
            LAYOUT,
            SETTINGS,
            "etag",
            "request",
            "an addition of 'w'",
            TIME,
            [ArenaValues(F8, 0, B), ArenaValues(F4, 0, W)],
        ),
        7,
        f'{{"added_to": "a", {SETTINGS_TEXT}, '
        '"parameters": [["w", [2, 3], "float32"], ["b", [2], "float64"], ["none", [0, 4], "float32"]], '
        f'"etag": "etag", "request_id": "request", "target": "an addition of \'w\'", {TIME_TEXT}}}',
    ),
]


def plain(value):
    """Something that can be compared: arrays by dtype and bytes, layouts by their parameters."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tobytes()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.parameters if isinstance(value, Layout) else value


def fields(record):
    content = record._asdict() if isinstance(record, StepRecord) else vars(record)
    return type(record), {name: plain(value) for name, value in content.items()}


@pytest.mark.parametrize(("record", "kind", "text"), WRITTEN, ids=lambda value: type(value).__name__)
def test_a_record_is_read_as_it_was_written_and_its_form_stays(record, kind, text):
    written = present(record).encode()
    assert (written[0], json.dumps(written[1])) == (kind, text)
    data = b"".join(array.tobytes() for array in written[2])
    found = records.decode(kind, json.loads(text), memoryview(data), Payloads(LAYOUT))
    assert found is not None
    assert fields(found) == fields(record)


def test_a_server_that_knows_no_settings_of_steps_refuses_a_record_that_has_some():
    """It looks for `tensors`. With it, it would make the step with the optimizer's own settings."""
    for record, _, text in WRITTEN:
        if isinstance(record, StepRecord):
            assert ("tensors" in json.loads(text)) == (record.settings is None)


def test_a_record_of_an_unknown_kind_is_none():
    assert records.decode(99, {"optimizer": "a"}, memoryview(b"")) is None


@pytest.mark.parametrize("name", FOLDERS)
def test_the_records_of_an_old_journal_are_written_again_byte_for_byte(tmp_path, name):
    folder, _ = golden(name, tmp_path)
    lsn, saved = snapshot.read(snapshot.paths(folder)[-1])
    payloads = {item.header["id"]: Payloads(item.layout) for item in saved}
    seen = set()
    for entry in Reader(folder, lsn):
        message = json.loads(entry.meta)
        optimizer = optimizer_of(message)
        record = records.decode(entry.kind, message, entry.payload, payloads.get(optimizer, Payloads(Layout(()))))
        if isinstance(record, CreationRecord):
            payloads[optimizer] = Payloads(record.layout)
        elif isinstance(record, AdditionRecord):
            payloads[optimizer] = Payloads(payloads[optimizer].layout.with_added(record.added))
        kind, again, arrays = present(record).encode()
        if "target" not in message:
            # Written down since.
            again.pop("target", None)
        assert (kind, json.dumps(again).encode()) == (entry.kind, entry.meta)
        assert b"".join(array.tobytes() for array in arrays) == bytes(entry.payload)
        seen.add(kind)
        # Views of the journal.
        del record, arrays
    # The first folders are older than the additions of parameters.
    assert seen == {1, 2, 3, 4, 5, 6} | ({7} if name > "folder-3" else set())


HALVES = [name for name in dir(transition) if name.startswith(("apply_", "note_"))]


def test_what_a_record_changes_is_the_same_code_live_and_in_recovery(tmp_path, monkeypatch):
    """Each half of each change is made by the same function, with the same record, in the same order."""
    made = []

    def watch(name):
        real = getattr(transition, name)

        def watched(*arguments, **options):
            record = next(item for item in arguments if hasattr(item, "encode"))
            kind, message, arrays = present(record).encode()
            # By the time of the other half, the updates have taken the place of the gradients.
            data = b"".join(array.tobytes() for array in arrays) if name.startswith("apply_") else b""
            made.append((name, kind, json.dumps(message), data))
            return real(*arguments, **options)

        monkeypatch.setattr(transition, name, watched)

    def step_of_workers():
        item.steps.workers.report("alice", leaving=False)
        options = StepOptions(StepSettings((Change(None, {"learning_rate": 0.5}, 0.25),)))
        under_way = item.steps.begin(StepRequest("first", worker="alice", options=options))
        for tensor, parameter in enumerate(LAYOUT.parameters):
            under_way.stage(tensor, 0, np.full(parameter.size, 3, parameter.dtype).tobytes())
        under_way.commit()
        under_way.close()
        item.steps.workers.report("alice", leaving=True)

    for name in HALVES:
        watch(name)
    server = Server(tmp_path)
    step(server.create("plain"), 0)
    server.create("gone")
    server.optimizers.delete("gone")
    settings = Settings(Adadelta(), clipping=Clipping("global_norm", 0.5), hosted=True)
    item = server.optimizers.create("a", LAYOUT, settings)
    upload = item.steps.begin_placement("upload")
    for tensor, parameter in enumerate(LAYOUT.parameters):
        upload.stage(tensor, 0, np.ones(parameter.size, parameter.dtype).tobytes(), Operand.PARAMETER)
    upload.commit()
    upload.close()
    shared = Settings(Adadelta(rho=0.5), clipping=Clipping("norm", 0.5), hosted=True, consistency=AsyncConsistency())
    server.optimizers.update("a", lambda _before, _layout: shared)
    step_of_workers()
    arenas = [ArenaValues(dtype, array, values + 1) for dtype, array, values in ARENAS]
    other = OtherState(5, LAYOUT, arenas, placed_by="upload", target="two")
    server.optimizers.replace(item, other, lambda _before, _layout: settings, request_id="restore")
    server.optimizers.update("a", lambda _before, _layout: shared)
    step_of_workers()
    new = NewParameters(Layout((Parameter("more", (3,), F4),)), (), "addition")
    with addition(server.optimizers, item, new, lambda _layout, _settings: None) as under_way:
        under_way.stage(0, 0, np.ones(3, F4).tobytes(), Operand.PARAMETER)
        under_way.commit()
    before = [fingerprint(server.optimizers.get(name)) for name in ("plain", "a")]
    workers, x = item.steps.workers.registry.to_json(), {k: v.tobytes() for k, v in item.state.parameters.items()}
    live, made[:] = list(made), []
    server.die()
    again = Server(tmp_path)
    assert made == live
    assert {name for name, *_ in made} == set(HALVES)
    found = again.optimizers.get("a")
    assert [fingerprint(again.optimizers.get(name)) for name in ("plain", "a")] == before
    assert found.steps.workers.registry.to_json() == workers
    assert {k: v.tobytes() for k, v in found.state.parameters.items()} == x
    again.die()
