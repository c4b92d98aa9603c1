"""``nnkit info`` and ``nnkit version``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys

import jax
import pytest

import nnkit
from nnkit import cli
from nnkit.cli import info


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{nnkit.__version__}\n"


def test_info_as_json_and_as_text(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nnkit"] == nnkit.__version__
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["backend"] == jax.default_backend()
    assert len(found["devices"]) == jax.device_count()
    assert found["x64"] is False
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["memory"].endswith(" GiB")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"jax {jax.__version__}" in out
    assert all(f"{name.replace('_', ' ')}:" in out for name in found)


def test_extras_are_there_when_all_of_theirs_is(monkeypatch):
    requires = {
        "nnkit": [
            "jax>=0.10",
            'a>=1; extra == "one"',
            'b[fast,loud]>=2; extra == "one"',
            'c; extra == "two"',
            'nnkit[one]; extra == "all"',
            'nnkit[two,one]; extra == "more"',
        ],
        "b": ['d>1; extra == "fast"', 'd; extra == "other"'],
    }
    there = {"nnkit", "a", "b", "d"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "requires", requires.get)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert info._extras() == (["one", "all"], ["two", "more"])
    there.remove("d")
    assert info._extras() == ([], ["one", "two", "all", "more"])


def test_a_checkout_that_is_not_installed_knows_no_extras(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    assert info._extras() == ([], [])


def test_memory_may_be_unknown(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert info._gigabytes(info._memory()) == "unknown"


@pytest.mark.parametrize("limit", [None, 2**33])
def test_a_devices_memory(limit):
    class Device:
        device_kind, id = "chip", 0

        def memory_stats(self):
            return {"bytes_limit": limit} if limit else None

    assert info._device(Device()) == ("chip 0 with 8.0 GiB" if limit else "chip 0")
