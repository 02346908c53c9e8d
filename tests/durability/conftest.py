"""What tests of data folders and of checkpoints share."""

import pytest

from durability.folder import Server
from optserve_server.persistence.checkpoint_store import FolderStore
from optserve_server.persistence.checkpoints import Checkpoints


@pytest.fixture
def folder(tmp_path):
    server = Server(tmp_path)
    yield server, Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints"), max_checkpoints=3)
    server.die()
