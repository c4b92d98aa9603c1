"""``nnkit info`` and ``nnkit version``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
from typing import Any

import jax

import nnkit
from nnkit.train.runs import provenance

__all__ = ["Info", "Version", "gathered"]


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices, cores, memory, and which of nnkit's extras are installed."""

    json: bool = False
    """Print it as JSON."""

    def __call__(self) -> int:
        found = gathered()
        if self.json:
            print(json.dumps(found, indent=1))
            return 0
        for name, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
            elif isinstance(value, list):
                value = ", ".join(map(str, value)) or "none"
            print(f"{name.replace('_', ' ') + ':':<18} {value}")
        return 0


@dataclasses.dataclass(frozen=True)
class Version:
    """Print nnkit's version."""

    def __call__(self) -> int:
        print(nnkit.__version__)
        return 0


def gathered() -> dict[str, Any]:
    """What there is to know of this machine and this installation, in JSON's types."""
    about, extras = provenance(), _extras()
    versions = {name: version for name, version in about["versions"].items() if version}
    return {
        "nnkit": nnkit.__version__,
        "versions": {name: version for name, version in versions.items() if name != "nnkit"},
        "backend": about["device"]["backend"],
        "devices": [_device(device) for device in jax.devices()],
        "x64": about["device"]["x64"],
        "processes": about["device"]["processes"],
        "platform": f"{about['platform']['system']}, {about['platform']['machine']}",
        "cores": about["platform"]["cores"],
        "memory": _gigabytes(_memory()),
        "extras": extras[0],
        "extras_missing": extras[1],
    }


def _device(device: Any) -> str:
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return f"{device.device_kind} {device.id}" + (f" with {_gigabytes(limit)}" if limit else "")


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # Windows


def _extras() -> tuple[list[str], list[str]]:
    """The extras whose distributions are all there, and the others, by nnkit's own metadata."""
    there = {extra: all(map(_is_there, needed)) for extra, needed in _needs("nnkit").items()}
    return [e for e, ok in there.items() if ok], [e for e, ok in there.items() if not ok]


def _needs(distribution: str) -> dict[str, list[str]]:
    """By extra, what it asks for: distributions, perhaps with extras of theirs in brackets."""
    try:
        wanted = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return {}  # a checkout that is not installed
    found: dict[str, list[str]] = {}
    for requirement in wanted:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        name = re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)
        if extra and name:
            found.setdefault(extra[1], []).append(name[0])
    return found


def _is_there(requirement: str) -> bool:
    name, _, extras = requirement.rstrip("]").partition("[")
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    needs = _needs(name) if extras else {}
    return all(_is_there(needed) for extra in extras.split(",") for needed in needs.get(extra, []))
