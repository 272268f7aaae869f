"""The ticket directory, format 1.0: ``tensors.safetensors`` and ``manifest.json``, no pickle anywhere.

The reader trusts nothing: names, sizes, hashes, bits and values are all checked before a tensor is handed out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import ConfigError, DataError, TicketError
from fxsparse.lottery.canonical import DTYPES, dtype_name, sha256_json, strict_json
from fxsparse.lottery.run_directory import committed, describe
from fxsparse.sparsity import (
    LINEAR,
    PATTERNS,
    Layout,
    Mask,
    Pattern,
    SharedSupport,
    Unstructured,
    read_pattern,
    support_order,
    tensor_sha256,
)

FORMAT = "fxsparse.ticket"
VERSION = "1.0"
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
UNHASHED = ("ticket_id", "metrics", "environment", "files")
NAME = re.compile(r"[^/\\\x00-\x1f.]+(\.[^/\\\x00-\x1f.]+)*")
HASH = re.compile(r"[0-9a-f]{64}")


def ticket_id(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of the manifest less its id, metrics, environment and files."""
    return sha256_json({key: value for key, value in manifest.items() if key not in UNHASHED})


def write_ticket(path: Path, tensors: Mapping[str, Tensor], manifest: dict[str, Any]) -> dict[str, Any]:
    """Write a ticket directory atomically; the manifest gets its id and files.

    Raises:
        TicketError: the path exists already or cannot be written; nothing is left behind.
    """
    from safetensors.torch import save

    with committed(path, manifest=False) as temporary:
        (temporary / TENSORS).write_bytes(
            save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": FORMAT})
        )
        full = {**manifest, "files": [describe(temporary / TENSORS, temporary)]}
        full["ticket_id"] = ticket_id(full)
        text = json.dumps(full, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return full


class TicketReader:
    """Reads and checks one ticket directory.

    Every failure is a TicketError that names the file, the tensor and the value.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, file: str, what: str) -> TicketError:
        """The error for a finding."""
        return TicketError(f"{self.path / file}: {what}; the ticket is unusable, restore it from a copy")

    def manifest(self) -> dict[str, Any]:
        """The manifest, its structure, version, names and id checked."""
        if not self.path.is_dir():
            raise TicketError(f"`path` (={self.path}) is no ticket directory; check the path")
        try:
            manifest = strict_json((self.path / MANIFEST).read_text(encoding="utf-8"))
        except OSError as error:
            raise self.fail(MANIFEST, f"cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise self.fail(MANIFEST, f"is not valid JSON ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self.fail(MANIFEST, f"`format` is not {FORMAT}")
        version = manifest.get("version")
        if not isinstance(version, str) or version.partition(".")[0] != VERSION.partition(".")[0]:
            raise TicketError(
                f"{self.path / MANIFEST}: `version` (={version!r}) is not {VERSION.partition('.')[0]}.x; "
                "read it with the fxsparse that wrote it"
            )
        try:
            self._check_structure(manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise self.fail(MANIFEST, f"a field is missing or of the wrong type ({error!r})") from error
        if (found := ticket_id(manifest)) != manifest["ticket_id"]:
            raise self.fail(MANIFEST, f"`ticket_id` (={manifest['ticket_id']}) does not match its content ({found})")
        return manifest

    def _check_structure(self, manifest: dict[str, Any]) -> None:
        names = [row["name"] for row in manifest["masks"]], [row["name"] for row in manifest["weights"]["tensors"]]
        aliases = manifest["weights"]["aliases"]
        for listed in (*names, list(aliases), list(aliases.values())):
            for name in listed:
                if not isinstance(name, str) or not NAME.fullmatch(name):
                    raise self.fail(MANIFEST, f"tensor name {name!r} is not a parameter name")
        for listed in names:
            if len(set(listed)) != len(listed):
                raise self.fail(MANIFEST, f"a tensor name stands twice in {sorted(listed)}")
        if not set(aliases.values()) <= set(names[1]) or set(aliases) & set(names[1]):
            raise self.fail(MANIFEST, f"`aliases` (={aliases}) do not point at tensors")
        rows = {row["name"]: row for row in manifest["weights"]["tensors"]}
        if not set(names[0]) <= set(rows):
            raise self.fail(MANIFEST, f"a mask has no weight: {sorted(set(names[0]) - set(rows))[0]!r}")
        for row in [*manifest["masks"], *rows.values()]:
            self._check_row(row)
        for row in manifest["masks"]:
            if row["shape"] != rows[row["name"]]["shape"] or row["numel"] != math.prod(row["shape"]):
                raise self.fail(MANIFEST, f"mask `{row['name']}`: `shape` (={row['shape']}) is not its weight's")
            self.rule(row)
            if type(row["alive"]) is not int or not 0 <= row["alive"] <= row["numel"]:
                raise self.fail(MANIFEST, f"mask `{row['name']}`: `alive` (={row['alive']}) is out of range")
        if manifest["weights"]["kind"] not in ("init", "rewind"):
            raise self.fail(MANIFEST, f"`weights.kind` (={manifest['weights']['kind']}) must be init or rewind")
        for key in ("lineage", "model", "metrics", "environment"):
            if not isinstance(manifest[key], dict):
                raise self.fail(MANIFEST, f"`{key}` (={manifest[key]!r}) must be an object")
        if missing := sorted({"ticket_id", "files"} - set(manifest)):
            raise self.fail(MANIFEST, f"`{missing[0]}` is missing")
        for row in manifest["model"].get("input_signature") or []:
            self._check_input(row)

    def rule(self, row: Mapping[str, Any]) -> tuple[Pattern, Layout]:
        """Which masks are legal beside the one of this row: any, unless the row says more."""
        sizes = row.get("layout", {})
        try:
            if not isinstance(sizes, dict) or any(type(size) is not int for size in _flat(sizes.values())):
                raise ConfigError(f"`layout` (={sizes!r}) is no layout of whole numbers")
            batch = {"batch": tuple(sizes["batch"])} if "batch" in sizes else {}
            return read_pattern(row.get("pattern", str(Unstructured()))), Layout(**{**sizes, **batch})
        except (ConfigError, TypeError) as error:
            raise self.fail(MANIFEST, f"mask `{row['name']}`: {error}") from error

    def _check_input(self, row: Mapping[str, Any]) -> None:
        sizes = row["shape"]
        if not isinstance(sizes, list) or any(size is not None and type(size) is not int for size in sizes):
            raise self.fail(MANIFEST, f"`input_signature`: `shape` (={sizes}) is not a list of sizes")
        if not isinstance(getattr(torch, row["dtype"], None), torch.dtype):
            raise self.fail(MANIFEST, f"`input_signature`: `dtype` (={row['dtype']!r}) is unknown")

    def _check_row(self, row: Mapping[str, Any]) -> None:
        shape = row["shape"]
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            raise self.fail(MANIFEST, f"tensor `{row['name']}`: `shape` (={shape}) is not a list of sizes")
        if not isinstance(row["sha256"], str) or not HASH.fullmatch(row["sha256"]):
            raise self.fail(MANIFEST, f"tensor `{row['name']}`: `sha256` (={row['sha256']!r}) is no hash")
        if "dtype" in row and row["dtype"] not in DTYPES:
            raise self.fail(MANIFEST, f"tensor `{row['name']}`: `dtype` (={row['dtype']!r}) is unknown")

    def tensors(self, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
        """All tensors by key, after the file's size and hash and the header have been checked."""
        from safetensors import SafetensorError, safe_open

        rows = manifest["files"]
        if not isinstance(rows, list) or [r.get("name") if isinstance(r, dict) else r for r in rows] != [TENSORS]:
            raise self.fail(MANIFEST, f"`files` (={rows}) must list {TENSORS} and nothing else")
        try:
            found = describe(self.path / TENSORS, self.path)
        except OSError as error:
            raise self.fail(TENSORS, f"cannot be read ({error.strerror})") from error
        for key in ("bytes", "sha256"):
            if found[key] != rows[0].get(key):
                raise self.fail(TENSORS, f"`{key}` (={found[key]}) differs from the manifest's {rows[0].get(key)}")
        try:
            with safe_open(self.path / TENSORS, "pt") as file:
                if file.metadata() != {"format": FORMAT}:
                    raise self.fail(TENSORS, f"its metadata (={file.metadata()}) is not that of a little-endian ticket")
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # safe_open is no mapping
        except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as error:
            raise self.fail(TENSORS, f"its header is damaged ({error})") from error

    def masks(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bool masks, bits, counts and hashes checked."""
        result = {}
        for row in manifest["masks"]:
            name = row["name"]
            try:
                mask = Mask.unpack(self._take(tensors, f"mask/{name}"), row["shape"])
            except DataError as error:
                raise self.fail(TENSORS, f"mask `{name}`: {error}") from error
            if mask.alive != row["alive"]:
                raise self.fail(TENSORS, f"mask `{name}`: `alive` (={mask.alive}) is not the manifest's {row['alive']}")
            if (found := mask.sha256(name)) != row["sha256"]:
                raise self.fail(TENSORS, f"mask `{name}`: `sha256` (={found}) is not {row['sha256']}")
            result[name] = mask.tensor
            self._check_pattern(row, mask.tensor)
        return result

    def _check_pattern(self, row: Mapping[str, Any], mask: Tensor) -> None:
        pattern, layout = self.rule(row)
        try:
            pattern.units(mask.shape, layout)
            if not bool(mask.all()):
                pattern.check(mask, layout, held_order(pattern, mask, layout))
        except ConfigError as error:
            raise self.fail(TENSORS, f"mask `{row['name']}`: {error}") from error

    def weights(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights and buffers to retrain from, hashes checked."""
        result = {}
        for row in manifest["weights"]["tensors"]:
            tensor = self._take(tensors, f"{manifest['weights']['kind']}/{row['name']}")
            self._check_tensor(row, tensor)
            if (found := tensor_sha256(row["name"], tensor)) != row["sha256"]:
                raise self.fail(TENSORS, f"tensor `{row['name']}`: `sha256` (={found}) differs from {row['sha256']}")
            result[row["name"]] = tensor
        return result

    def final(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The trained weights and buffers, where the ticket has them: all of them, or none."""
        rows = manifest["weights"]["tensors"]
        if not any(key.startswith("final/") for key in tensors):
            return None
        result = {row["name"]: self._take(tensors, f"final/{row['name']}") for row in rows}
        for row in rows:
            self._check_tensor(row, result[row["name"]])
        return result

    def optimizer(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Optimizer state tensors by parameter and slot."""
        known = {row["name"] for row in manifest["weights"]["tensors"]}
        result: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            name, _, slot = rest.rpartition("/")
            if kind == "optim" and name in known and NAME.fullmatch(slot):
                self._check_finite(key, tensor)
                result.setdefault(name, {})[slot] = tensor
        return result

    def check_no_others(self, tensors: Mapping[str, Tensor], known: set[str]) -> None:
        """Every key in the file is one that the manifest speaks of."""
        if unknown := sorted(set(tensors) - known):
            raise self.fail(TENSORS, f"tensor `{unknown[0]}` is unknown to the manifest")

    def _take(self, tensors: Mapping[str, Tensor], key: str) -> Tensor:
        if key not in tensors:
            raise self.fail(TENSORS, f"tensor `{key}` is missing")
        return tensors[key]

    def _check_tensor(self, row: Mapping[str, Any], tensor: Tensor) -> None:
        name = row["name"]
        if str(tensor.dtype).removeprefix("torch.") != row["dtype"] or list(tensor.shape) != row["shape"]:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise self.fail(TENSORS, f"tensor `{name}` (={found}) is not {row['dtype']} {row['shape']}")
        self._check_finite(name, tensor)

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise self.fail(TENSORS, f"tensor `{name}` holds NaN or Inf (={bad} values)")


def rule_row(pattern: Pattern, layout: Layout) -> dict[str, Any]:
    """What the row of a mask says of its pattern: nothing when any mask is legal, or one that fxsparse cannot read."""
    if isinstance(pattern, Unstructured) or type(pattern) not in PATTERNS:
        return {}
    said = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    other = {name: value for name, value in said.items() if value != getattr(LINEAR, name)}
    batch = {"batch": list(layout.batch)} if "batch" in other else {}
    return {"pattern": str(pattern), **({"layout": {**other, **batch}} if other else {})}


def held_order(pattern: Pattern, mask: Tensor, layout: Layout) -> Tensor | None:
    """The row order in which a mask holds its pattern; None for patterns that have none, and where none does."""
    return support_order(mask, pattern.group, layout) if isinstance(pattern, SharedSupport) else None


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, list) else (value,)


def tensor_row(row: dict[str, object], tensor: Tensor) -> dict[str, object]:
    """A manifest row with the tensor's hash.

    Raises:
        TicketError: the tensor is not finite; a reader would refuse the ticket.
    """
    name = str(row["name"])
    dtype_name(tensor.dtype)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise TicketError(f"tensor `{name}` holds NaN or Inf (={int((~torch.isfinite(tensor)).sum())} values)")
    return {**row, "sha256": tensor_sha256(name, tensor)}
