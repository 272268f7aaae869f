"""Directories that exist whole or not at all, and run directories named after what was run.

A directory is written as ``.tmp-<name>-<pid>`` beside its target, every file is synced, ``COMMIT.json`` (the files with
their hashes) comes last, then one rename makes it appear. What COMMIT.json does not vouch for does not exist. A run
directory is called ``<name>-<first 12 hex digits of the configuration's hash>``: another configuration, another place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery.canonical import canonical_json, sha256_file, sha256_json, strict_json
from fxsparse.lottery.lock import lock

COMMIT = "COMMIT.json"
CONFIG = "config.yaml"
DATA = "data.json"
NEUTRAL = ("artifacts_dir", "results_dir", "device", "num_workers", "verbosity")
"""Fields, in any section, without meaning for the result of one seed."""
NEUTRAL_PATHS = ("run.name", "run.seed", "run.seeds", "report")


def config_hash(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, schema_version: int = 1) -> str:
    """SHA-256 of what a configuration says about the result of one seed.

    Args:
        config: nested mappings of plain values.
        defaults: fields equal to theirs are left out, so that a new field keeps the old hashes.
        schema_version: raised whenever a default changes.

    Examples:
        >>> config_hash({"imp": {"prune_rate_per_round": 0.1, "target_sparsity": 0.95}, "run": {"seed": 3}})[:12]
        '0ca491b39616'
    """
    return sha256_json({**_significant(config, defaults or {}, ""), "schema_version": schema_version})


def _significant(config: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        where = f"{path}.{key}" if path else key
        if key in NEUTRAL or where in NEUTRAL_PATHS:
            continue
        if isinstance(value, Mapping) and isinstance(default := defaults.get(key, {}), Mapping):
            value = _significant(value, default, where)
            if value:
                result[key] = value
        elif key not in defaults or canonical_json(value) != canonical_json(defaults[key]):
            result[key] = value
    return result


def fsync(path: Path) -> None:
    """Make a file or a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, text: str) -> None:
    """Write a file atomically and durably: temporary, fsync, replace.

    Raises:
        TicketError: the file cannot be written; what stood there stays.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-{os.getpid()}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def unwritable(path: Path, error: OSError) -> TicketError:
    """The error for a path that the system refuses to write."""
    reason = error.strerror or str(error)
    return TicketError(f"`path` (={path}) cannot be written: {reason}; nothing was left, free space or choose another")


@contextlib.contextmanager
def committed(target: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Write a directory that appears at `target` whole, when the block ends without an exception.

    Args:
        target: where it appears; its parents are made.
        manifest: add COMMIT.json, so that `verify` can vouch for the content.

    Yields:
        the temporary directory to write into.

    Raises:
        TicketError: the target exists already, or cannot be written (full or read-only disk); nothing is left behind.
    """
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise TicketError(f"`path` (={target}) exists already; nothing is ever overwritten, choose another")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for file in files:
            fsync(file)
        if manifest:
            rows = [describe(file, temporary) for file in files]
            (temporary / COMMIT).write_text(json.dumps({"files": rows}, sort_keys=True), encoding="utf-8")
            fsync(temporary / COMMIT)
        for directory in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            fsync(directory)
        os.rename(temporary, target)
        fsync(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(file: Path, root: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    return {"name": file.relative_to(root).as_posix(), "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def is_committed(path: Path) -> bool:
    """Whether a directory is there and its COMMIT.json vouches for every file."""
    try:
        rows = strict_json((path / COMMIT).read_text(encoding="utf-8"))["files"]
        return all(row == describe(path / row["name"], path) for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sweep(directory: Path) -> None:
    """Remove what killed writers left: ``.tmp-*``. Call it under the lock only."""
    for path in directory.glob(".tmp-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Remove a directory that exists without a valid commit, with a warning."""
    if os.path.lexists(path):
        warnings.warn(f"{path} is damaged or not committed; it is made again", RuntimeWarning, stacklevel=2)
        trash = path.parent / f".tmp-damaged-{path.name}-{os.getpid()}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


@dataclass(frozen=True)
class RunDirectory:
    """A run directory held by this process.

    Attributes:
        path: ``<results_dir>/<name>-<hash>``.
        config_hash: the hash of the configuration.
    """

    path: Path
    config_hash: str

    def seed(self, seed: int) -> Path:
        """The directory of one seed."""
        return self.path / f"seed_{seed}"

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        results_dir: Path,
        name: str,
        config: Mapping[str, Any],
        data_fingerprint: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        schema_version: int = 1,
        resume: Path | None = None,
    ) -> Iterator[RunDirectory]:
        """Make or reopen the directory of a configuration and hold its lock.

        Args:
            results_dir: where run directories live.
            name: the first part of the directory's name.
            config: the resolved configuration: nested mappings of plain values.
            data_fingerprint: identifies the data; a directory made from other data is refused.
            defaults: see `config_hash`.
            schema_version: see `config_hash`.
            resume: an existing directory to go on in, instead of the one that name and hash say.

        Raises:
            ConfigError: the directory is of another configuration or other data (the differing fields are listed), or
                another process holds it.
            TicketError: the directory cannot be written.
        """
        digest = config_hash(config, defaults, schema_version)
        path = resume if resume is not None else results_dir / f"{name}-{digest[:12]}"
        if resume is not None and not (resume / CONFIG).is_file():
            raise ConfigError(f"`resume` (={resume}) is not a run directory; leave it out to start a new one")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        with lock(path):
            sweep(path)
            _settle(path, config, digest, data_fingerprint)
            yield cls(path, digest)


def _settle(path: Path, config: Mapping[str, Any], digest: str, fingerprint: str) -> None:
    """Write config.yaml and data.json, or compare with those that are there."""
    import yaml

    record = {"config_hash": digest, "fingerprint": fingerprint}
    if (path / CONFIG).is_file() and (path / DATA).is_file():
        try:
            there = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
            data = strict_json((path / DATA).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"run directory (={path}) is damaged: {error}; move it away") from error
        if data["config_hash"] != digest:
            fields = ", ".join(differing(there, config))
            raise ConfigError(f"run directory (={path}) is of another configuration; differing fields: {fields}")
        if data["fingerprint"] != fingerprint:
            raise ConfigError(
                f"run directory (={path}) was made from other data: `fingerprint` (={fingerprint[:12]}) differs from "
                f"{str(data['fingerprint'])[:12]}; restore the data or choose another `results_dir`"
            )
        return
    write_file(path / CONFIG, yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=True))
    write_file(path / DATA, json.dumps(record, sort_keys=True))


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two nested mappings differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted({*one, *other}, key=str)
        return [
            where
            for key in keys
            for where in differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if canonical_json(one) == canonical_json(other) else [path]
