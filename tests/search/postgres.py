"""A PostgreSQL server of its own, in a folder, for as long as it is needed.

    with postgres.server() as running:
        optuna.create_study(storage=search.open_storage(running.url))

    python -m tests.search.postgres --folder /tmp/study       # until Ctrl-C; the second time with what is in it

It listens on a Unix socket in the folder and on no port. PostgreSQL refuses to run as root; then it runs as the user
``postgres`` or ``nobody``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["Server", "server", "why_not"]

_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "60",
    "shared_buffers": "32MB",
    # A server that is killed loses nothing by this, only a machine that loses its power.
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
}
_LONGEST_SOCKET = 90  # bytes; the kernel takes 107, of which the socket's own name needs some


def why_not() -> str | None:
    """Why no server can be started here, as the reason of a skipped test; None where one can."""
    missing = [name for name in ("initdb", "pg_ctl", "postgres") if _program(name) is None]
    if missing:
        return f"no PostgreSQL here: {', '.join(missing)} neither in PATH nor in /usr/lib/postgresql/*/bin"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


class Server:
    """A server with its data in ``folder``, which is made where it is new."""

    def __init__(self, folder: str | os.PathLike[str]):
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        self._user = _other_user() if os.geteuid() == 0 else None
        folder = Path(folder).absolute()
        self._data, self._log, self._socket = folder / "data", folder / "log", folder / "socket"
        if len(os.fsencode(self._socket)) > _LONGEST_SOCKET:
            raise RuntimeError(f"the path {str(folder)!r} is too long for a socket: choose a shorter one")
        for path in (folder, self._data, self._log, self._socket):
            self._make(path)
        self.url = f"postgresql://nnkit@/postgres?host={quote(str(self._socket))}"
        if not (self._data / "PG_VERSION").exists():
            self._run(
                "initdb", "-D", self._data, "-U", "nnkit", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"
            )
            # The client of another server's settings could read the data: only this user and root.
            settings = _SETTINGS | {"unix_socket_directories": str(self._socket)}
            with open(self._data / "postgresql.conf", "a") as file:
                file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", self._data, "-l", self._log / "server.log")

    def stop(self, *, immediate: bool = False) -> None:
        """Stops it: its connections are cut; ``immediate`` is as if it were killed, with recovery at the start."""
        mode = "immediate" if immediate else "fast"
        self._run("pg_ctl", "stop", "-w", "-t", "60", "-D", self._data, "-m", mode)

    def _make(self, path: Path) -> None:
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True)
            if self._user is not None:
                os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _run(self, program: str, *arguments: Any) -> None:
        as_whom: dict[str, Any] = {}
        if self._user is not None:
            as_whom = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        # The server keeps what it inherits open: output goes to files, or a reader of a pipe would wait for it.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [str(_program(program)), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                **as_whom,
            )
            if done.returncode != 0:
                output.seek(0)
                raise RuntimeError(f"{program} failed: {output.read().decode(errors='replace').strip()}")


@contextlib.contextmanager
def server(folder: str | os.PathLike[str] | None = None) -> Iterator[Server]:
    """A running :class:`Server` in ``folder``; by default in a temporary one that goes with it."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = tempfile.mkdtemp(prefix="nnkit-postgres-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if os.geteuid() == 0 and (user := _other_user()) is not None:
                os.chown(folder, user.pw_uid, user.pw_gid)
        running = Server(folder)
        running.start()
        stack.callback(running.stop)
        yield running


def _program(name: str) -> str | None:
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: _version(path))
    return shutil.which(name) or (str(newest[-1]) if newest else None)


def _version(path: Path) -> float:
    try:
        return float(path.parts[4])
    except ValueError:
        return 0.0


def _other_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="A PostgreSQL server of its own, until Ctrl-C.")
    parser.add_argument("--folder", help="where its data are kept; by default a temporary one")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with server(arguments.folder) as running:
        print(f"storage: {running.url}", flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
