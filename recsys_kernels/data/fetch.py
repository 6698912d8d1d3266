"""Finds or fetches MovieLens 100k, which may not be redistributed with this package.

The RecBole wheel carries it. In order: an installed recbole's files, this package's cache, one
`pip download` into the cache. Every file is checked against its SHA-256.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from .checksum import sha256
from .errors import DataError

WHEEL = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_TIMEOUT_S = 300


def movielens_100k(cache: Path | None = None) -> Path:
    """Returns a folder with the three MovieLens 100k files, fetching them if it must.

    Args:
        cache: where fetched files are kept; the user's cache folder of this platform by default.

    Raises:
        DataError: not found, and pip cannot fetch the wheel, or a file differs from its SHA-256.
    """
    installed = installed_recbole()
    if installed is not None and not _damage(installed):
        return installed
    folder = (cache or default_cache()) / "ml-100k"
    if _damage(folder):
        _download(folder)
    return folder


def default_cache() -> Path:
    """This platform's cache folder for the package."""
    return Path(platformdirs.user_cache_dir("recsys_kernels"))


def installed_recbole() -> Path | None:
    """Folder of the files in an installed recbole, which is not imported; None without one."""
    spec = importlib.util.find_spec("recbole")
    places = (spec.submodule_search_locations or []) if spec else []
    folder = next((Path(place) / "dataset_example" / "ml-100k" for place in places), None)
    return folder if folder is not None and folder.is_dir() else None


def _damage(folder: Path) -> str:
    """Why the folder cannot be used; empty if it can."""
    for name, expected in SHA256.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} differs from its SHA-256"
    return ""


def _download(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
            wheel = _pip_download(Path(scratch))
            if sha256(wheel) != WHEEL_SHA256:
                raise DataError(f"{WHEEL}: the downloaded {wheel.name} differs from its SHA-256")
            folder.mkdir(exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                for name in SHA256:
                    part = Path(scratch) / name
                    part.write_bytes(archive.read(f"{FOLDER}/{name}"))
                    os.replace(part, folder / name)
    except OSError as error:
        raise DataError(f"{folder}: cannot keep MovieLens 100k there ({error.strerror or error})") from None
    if damage := _damage(folder):
        raise DataError(f"{folder}: {damage}")


def _pip_download(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), WHEEL]
    advice = f"install it yourself (pip install --no-deps {WHEEL}) or name your own data with --data PATH"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"MovieLens 100k: pip did not fetch {WHEEL} in {_TIMEOUT_S} s; {advice}") from None
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no reason given"]
        raise DataError(f"MovieLens 100k: pip cannot fetch {WHEEL} ({lines[0].strip()}); {advice}")
    return wheels[0]
