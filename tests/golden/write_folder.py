"""Writes a golden data folder and what is to be found in it: write_folder.py NAME makes NAME.tar.xz and NAME.json.

It was run once, by the code of its day; what it made is committed, and must be readable ever after. Run it again, under
another name, when the format changes, and keep the old ones.
"""

import io
import json
import lzma
import shutil
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

import optserve

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.look import CONFIG, gradients, look, state, step
from optserve_server.engine.record_encoding import STEPPED
from optserve_server.persistence import journal, snapshot
from optserve_server.persistence.journal import format as on_disk

HERE = Path(__file__).parent
SETTINGS = "segment_bytes = 1048576\nsnapshot_bytes = 1048576\n"
PARAMS = {
    "w": np.zeros((3, 2), np.float32),
    "b": np.zeros(5, np.float64),
    "scalar": np.zeros((), np.float32),
    "empty": np.zeros((0, 4), np.float64),
}
ADDED = {"head": np.zeros((2, 3), np.float32), "none": np.zeros(0, np.float64), "bias": np.zeros(2, np.float64)}
"""Parameters that come later. From the fourth folder on."""
LARGE = {"x": np.zeros(90_000, np.float32), "y": np.zeros(3, np.float64)}
METHODS = {
    "adadelta": optserve.Adadelta(rho=0.9, eps=1e-5, learning_rate=0.7),
    "adagrad": optserve.Adagrad(learning_rate=0.1),
    "diagonal-hessian": optserve.DiagonalHessian(mu=0.5, learning_rate=0.2),
    "momentum": optserve.Momentum(learning_rate=0.05, rho=0.8),
    "sgd": optserve.Sgd(learning_rate=0.03),
    "vsgd": optserve.Vsgd(eps=1e-3, initial_overestimate=2.0, initial_steps=2),
    "windowed-rms": optserve.WindowedRms(learning_rate=0.01, rho=0.95, eps=0.0, outer_eps=1e-3),
    # From the second folder on.
    "adam": optserve.Adam(learning_rate=0.02, beta1=0.8),
    "adamw": optserve.AdamW(beta2=0.99),
    "centered-rmsprop": optserve.CenteredRmsprop(eps=1e-4, momentum=0.5),
    "fed-adam": optserve.FedAdam(bias_correction=True),
    "lion": optserve.Lion(learning_rate=0.03),
    "nadam": optserve.Nadam(momentum_decay=0.1),
    "rmsprop": optserve.Rmsprop(rho=0.9, momentum=0.7),
    "sgd-momentum": optserve.SgdMomentum(momentum=0.8, nesterov=True),
    "yogi": optserve.Yogi(beta2=0.9),
}
GROUPS = [optserve.Group(("b", "scalar"), {"learning_rate": 0.25})]


def starting_values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(param.shape).astype(param.dtype) for name, param in PARAMS.items()}


class Story:
    """What happens to the folder, in three acts: before its snapshot, while that is written, and behind it."""

    def __init__(self, client: optserve.Client, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.expected: dict[str, Any] = {"saved": {}}

    def before(self) -> None:
        create = self.client.create_optimizer
        for seed, (name, method) in enumerate(METHODS.items()):
            # Of the settled ones no step has to be made again: their arrays are what the snapshot says.
            for each in (name, f"{name}-settled"):
                opt = create(each, method, PARAMS)
                for turn in range(4):
                    step(opt, PARAMS, 10 * seed + turn, ("b",) if turn == 2 else ())
        schedule = optserve.Cosine(period_steps=20, floor=0.1, warmup_steps=3)
        opt = create(
            "scheduled", optserve.Adadelta(), PARAMS, schedule=schedule, groups=GROUPS,
            clipping=optserve.Clipping(global_norm=0.5),
        )  # fmt: skip
        self.steps(opt, 100, 5)
        milestones = optserve.AtSteps(rate=0.5, milestones=(1, 3, 5))
        opt = create("changed", METHODS["momentum"], PARAMS, schedule=milestones, clipping=optserve.Clipping(value=0.8))
        self.steps(opt, 110, 3)
        groups = [optserve.Group(("w",), {"rho": 0.5}, weight_decay=0.0)]
        opt = create(
            "hosted", METHODS["momentum"], starting_values(1), hosted=True, weight_decay=0.01, groups=groups
        )  # fmt: skip
        self.steps(opt, 120, 3)
        specs = {name: optserve.TensorSpec(param.shape, param.dtype) for name, param in PARAMS.items()}
        create("late-parameters", METHODS["adagrad"], specs, hosted=True)
        self.steps(create("restored", METHODS["adadelta"], PARAMS), 130, 2)
        self.save("restored", "two")
        self.steps(self.client.optimizer("restored"), 132, 2)
        self.save("restored", "four")
        self.steps(create("imported", METHODS["windowed-rms"], PARAMS), 140, 1)
        self.steps(create("reborn", METHODS["adadelta"], PARAMS), 150, 2)
        self.steps(create("gone", METHODS["adadelta"], PARAMS), 160, 1)
        self.save("gone", "only")
        self.client.delete_optimizer("gone")
        self.steps(create("untouched", METHODS["adadelta"], PARAMS), 170, 0)
        consistencies = {
            "async": optserve.Async(scale_by_staleness=True),
            "bounded": optserve.Bounded(2),
            "sync": optserve.Sync(2),
        }
        for name, consistency in consistencies.items():
            create(name, METHODS["sgd"], starting_values(2), hosted=True, consistency=consistency, weight_decay=0.001)
        self.work(2)
        self.additions()
        create("large", METHODS["momentum"], LARGE)

    def during(self) -> bool:
        """Step until a snapshot is there whose pieces are of different steps; False if it became another one."""
        large, known = self.client.optimizer("large"), snapshot.paths(self.folder)
        turn = 0
        while snapshot.paths(self.folder) == known:
            step(large, LARGE, 200 + turn)
            turn += 1
        # Until the one before is gone, and nothing more is cut.
        while len(snapshot.paths(self.folder)) > 1 or (self.folder / "snapshot.tmp").exists():
            self.client.server_info()
        _, saved = snapshot.read(snapshot.paths(self.folder)[0])
        (of_large,) = [item for item in saved if item.header["id"] == "large"]
        return len({piece.lsn for piece in of_large.pieces}) > 1

    def behind(self) -> None:
        for seed, name in enumerate(METHODS):
            self.steps(self.client.optimizer(name), 300 + 10 * seed, 2)
        self.steps(self.client.optimizer("scheduled"), 400, 2)
        changed = self.client.optimizer("changed")
        changed.update(optserve.Momentum(learning_rate=0.02, rho=0.7))
        changed.update(schedule=optserve.Exponential(rate=0.9, period_steps=2), clipping=optserve.Clipping(norm=0.4))
        self.steps(changed, 410, 2)
        changed.update(groups=GROUPS, clipping=None)
        self.steps(changed, 412, 2)
        hosted = self.client.optimizer("hosted")
        self.steps(hosted, 420, 2)
        self.save("hosted", "five")
        late = self.client.optimizer("late-parameters")
        late.push_parameters(starting_values(3))
        self.steps(late, 430, 2)
        restored = self.client.optimizer("restored")
        restored.restore_checkpoint("two")
        self.steps(restored, 440, 1)
        restored.save_checkpoint("four", overwrite=True)
        self.keep("restored", "four")
        imported = self.client.optimizer("imported")
        imported.import_state(self.client.optimizer("windowed-rms").export_state())
        self.client.delete_optimizer("reborn")
        reborn = self.client.create_optimizer("reborn", METHODS["adagrad"], LARGE | {"z": np.zeros(2, np.float32)})
        step(reborn, {"z": np.zeros(2, np.float32)}, 450, ("z",))
        self.steps(self.client.create_optimizer("made-late", METHODS["adadelta"], PARAMS), 460, 1)
        step(self.client.optimizer("large"), LARGE, 470)
        self.work(2)
        self.own_settings()
        self.more_additions()

    def additions(self) -> None:
        """Parameters that come later, and weight decays of each kind: the snapshot has them. From the fourth folder on.

        Steps with settings of their own, for groups by position, come before and after them.
        """
        for name, method in (("added", "nadam"), ("added-behind", "adam"), ("added-settled", "adamw")):
            opt = self.client.create_optimizer(name, METHODS[method], PARAMS, groups=GROUPS)
            self.steps(opt, 180, 1)
            opt.step(gradients(PARAMS, 181), hyperparameters=[{"learning_rate": 0.25}, {"beta1": 0.5}])
            if name != "added-behind":
                self.add(opt, 182)
        kinds: dict[str, float | optserve.WeightDecay] = {
            "decay-fixed": 0.25, "decay-l2": optserve.L2(0.5), "decay-times": optserve.TimesLearningRate(0.125),
        }  # fmt: skip
        groups = [optserve.Group(("w",), {"learning_rate": 0.25}, weight_decay=0.5)]
        for name, decay in kinds.items():
            opt = self.client.create_optimizer(
                name, METHODS["adamw"], starting_values(8), hosted=True, weight_decay=decay, groups=groups
            )
            opt.step(gradients(PARAMS, 190), hyperparameters=[None, {"weight_decay": 0.25}], reply="parameters")

    def more_additions(self) -> None:
        """Additions and steps with settings of their own behind the snapshot, in one history."""
        added = self.client.optimizer("added")
        added.step(gradients(PARAMS | ADDED, 500), hyperparameters=[None, {"beta2": 0.5}, {"learning_rate": 0.125}])
        added.add_parameters({"last": np.zeros(3, np.float32)})
        step(added, PARAMS | ADDED, 501, tuple(PARAMS | ADDED))
        self.add(self.client.optimizer("added-behind"), 502)
        for name in ("decay-fixed", "decay-l2", "decay-times"):
            opt = self.client.optimizer(name)
            opt.step(gradients(PARAMS, 510), hyperparameters={"weight_decay": 0.125}, reply="nothing")
            self.add(opt, 511)
            opt.update(learning_rate=0.5)
            opt.step(gradients(PARAMS | ADDED, 515), hyperparameters=[None, None, {"weight_decay": 0.75}])

    def add(self, opt: optserve.Optimizer, seed: int) -> None:
        """Add parameters with a group of their own, then steps of all, of some, and with settings of their own."""
        rng = np.random.default_rng(seed)
        values = {name: rng.standard_normal(param.shape).astype(param.dtype) for name, param in ADDED.items()}
        decay = 0.0 if opt.hosted else None
        opt.add_parameters(values, groups=[optserve.Group(("bias",), {"learning_rate": 0.75}, weight_decay=decay)])
        step(opt, PARAMS | ADDED, seed)
        step(opt, PARAMS | ADDED, seed + 1, ("b", "head"))
        own = [{"learning_rate": 0.5}, None, {"beta1": 0.25}]
        opt.step(gradients(PARAMS | ADDED, seed + 2), hyperparameters=own)

    def own_settings(self) -> None:
        """Steps with settings of their own. From the third folder on."""
        create = self.client.create_optimizer
        schedule = optserve.Exponential(rate=0.9)
        opt = create("own-settings", METHODS["adam"], PARAMS, schedule=schedule, groups=GROUPS)
        for turn in range(4):
            rate = {"learning_rate": 0.5 / (turn + 1)}
            opt.step(gradients(PARAMS, 480 + turn), hyperparameters=[rate, {"beta1": 0.5}] if turn % 2 else rate)
        step(opt, PARAMS, 484, ("b",))
        x = starting_values(7)
        opt = create("own-settings-hosted", METHODS["sgd"], x, hosted=True, weight_decay=0.01)
        opt.step(gradients(PARAMS, 490), hyperparameters={"weight_decay": 0.5}, reply="parameters")
        with self.client.worker("async", "bob", transport="grpc") as bob:
            bob.pull()
            bob.step(gradients(PARAMS, 491), hyperparameters={"learning_rate": 0.25, "weight_decay": 0.125})

    def work(self, turns: int) -> None:
        """Two workers on each shared optimizer: one after the other, or together where a step waits for both."""
        for name in ("async", "bounded"):
            for worker in ("alice", "bob"):
                with self.client.worker(name, worker, transport="grpc") as working:
                    working.pull()
                    for turn in range(turns):
                        working.step({key: value + turn for key, value in starting_values(4).items()})
        with (
            self.client.worker("sync", "alice", transport="grpc") as alice,
            self.client.worker("sync", "bob", transport="grpc") as bob,
        ):
            alice.pull()
            bob.pull()
            for turn in range(turns):
                other = threading.Thread(target=alice.step, args=(starting_values(5 + turn),))
                other.start()
                bob.step(starting_values(6 + turn))
                other.join()

    def steps(self, opt: optserve.Optimizer, seed: int, count: int) -> None:
        for turn in range(count):
            step(opt, PARAMS, seed + turn)

    def save(self, name: str, tag: str) -> None:
        self.client.optimizer(name).save_checkpoint(tag)
        self.keep(name, tag)

    def keep(self, name: str, tag: str) -> None:
        self.expected["saved"][f"{name} {tag}"] = state(self.client.optimizer(name))


def tear(folder: Path) -> None:
    """Leave half of the last step's record, as a process does that dies while it writes; nothing was promised then."""
    path = journal.segment_paths(folder)[-1]
    content = bytearray(path.read_bytes())
    view, last = memoryview(bytes(content)), None
    record_format = on_disk.record_format_of(path, view)
    offset = record_format.first_offset
    while (header := on_disk.parse_header(view, offset, record_format)) is not None and header.has_payload(view):
        last, offset = header if header.kind == STEPPED else last, header.end
    if last is None:
        raise RuntimeError("there is no step to tear")
    middle = last.payload_offset + last.payload_bytes // 2
    content[middle:] = bytes(len(content) - middle)
    path.write_bytes(content)


def write(folder: Path, options: list[str]) -> dict[str, Any] | None:
    """Write a folder; returns what is to be found in it, or None if chance made another one of it."""
    with (
        optserve.local_server(folder, backend="numpy", options=options) as server,
        optserve.connect(server.target, CONFIG) as client,
    ):
        story = Story(client, folder)
        story.before()
        if not story.during():
            return None
        story.behind()
        seen = look(server.target)
        story.steps(client.optimizer("made-late"), 999, 1)
        server.process.kill()
        server.process.wait()
    if len(snapshot.paths(folder)) != 1 or (folder / "snapshot.tmp").exists():
        return None
    tear(folder)
    copy = shutil.copytree(folder, folder.with_name("copy"))
    with (
        optserve.local_server(copy, backend="numpy", options=options) as server,
        optserve.connect(server.target, CONFIG) as client,
    ):
        found = look(server.target)
        if found != seen:
            raise RuntimeError("a server that recovers the folder finds something else than the one that wrote it had")
        following = {name: step(client.optimizer(name), PARAMS, 500) for name in METHODS}
    shutil.rmtree(copy)
    following = {name: {key: value.tolist() for key, value in updates.items()} for name, updates in following.items()}
    return {**found, **story.expected, "following": following}


def pack(folder: Path, archive: Path) -> None:
    """A tar file that is the same whenever it is made."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.mode = 0o700 if path.is_dir() else 0o600
            if path.is_dir():
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = path.stat().st_size
                with path.open("rb") as file:
                    tar.addfile(info, file)
    archive.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main(name: str) -> None:
    found = None
    while found is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder, config = Path(temporary, "data"), Path(temporary, "optserve.toml")
            config.write_text(SETTINGS)
            found = write(folder, ["--config", str(config)])
            if found is not None:
                pack(folder, HERE / f"{name}.tar.xz")
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
