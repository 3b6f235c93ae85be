"""A real sshd on a free port of this machine, with throwaway keys: a device to copy to, build on and measure on."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

# Debian keeps it out of a user's PATH.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
DEVICE = "device's own $(disk)"
# Root's sshd wants a user and a folder of its own; both exist for it alone, in a mount namespace.
_AS_ROOT = (
    'mount -t tmpfs none /run && mkdir -m 755 /run/sshd && eval "${MOUNT:-true}" && '
    '{ id sshd >/dev/null 2>&1 || mount --bind "$0" /etc/passwd; } && exec "$@"'
)


@dataclass
class Server:
    """A running sshd.

    Attributes:
        address: for --device.
        folder: holds its keys, its configuration, what ssh should know of it, and the device's home.
        process: of the daemon.
    """

    address: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def cache(self) -> Path:
        """Where the device keeps bundles."""
        return self.folder / DEVICE / "thinet-deploy"

    def cut(self) -> None:
        """End every connection, as a pulled cable does; the daemon goes on."""
        for number in self._connections():
            os.kill(number, signal.SIGKILL)

    def stop(self) -> None:
        """Switch it off: the daemon and its connections."""
        connections = list(self._connections())
        self.process.kill()
        self.process.wait()
        for number in connections:
            os.kill(number, signal.SIGKILL)

    def _connections(self) -> Iterator[int]:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    yield int(stat.parent.name)


@contextmanager
def serving(folder: Path, port: int = 0, disk: str = "") -> Iterator[Server]:
    """Start one; skips the test where there is no sshd.

    Args:
        folder: for all that belongs to it; may be that of an earlier one.
        port: 0 for any.
        disk: size of the disk for bundles, such as "200k"; needs root.
    """
    sshd, own = shutil.which("sshd", path=_PATH), shutil.which("ssh")
    if sshd is None or own is None:
        pytest.skip("there is no sshd or no ssh here (apt install openssh-server)")
    if not (folder / "host").exists():
        _keys(folder, own)
    port = port or _free_port()
    config = folder / "sshd_config"
    config.write_text(_configuration(folder))
    command = [str(Path(sshd).absolute()), "-D", "-e", "-f", str(config), "-p", str(port)]
    environment = dict(os.environ)
    (folder / DEVICE).mkdir(exist_ok=True)
    if disk:
        if os.getuid():
            pytest.skip("only root can mount a small disk")
        environment["MOUNT"] = f"mount -t tmpfs -o size={disk} none {shlex.quote(str(folder / DEVICE))}"
    if os.getuid() == 0:
        (folder / "passwd").write_text(Path("/etc/passwd").read_text() + "sshd:x:22:65534::/run/sshd:/bin/false\n")
        command = ["unshare", "-m", "sh", "-c", _AS_ROOT, str(folder / "passwd"), *command]
    with (folder / "sshd.log").open("ab") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True, env=environment)
    server = Server(f"ssh://{getpass.getuser()}@127.0.0.1:{port}", folder, process)
    try:
        _wait(port, process, folder / "sshd.log")
        host = (folder / "host.pub").read_text().split()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host[0]} {host[1]}\n")
        yield server
    finally:
        server.stop()


def _keys(folder: Path, ssh: str) -> None:
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copyfile(folder / "client.pub", folder / "authorized_keys")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    # The user's ~/.ssh is not touched: `ssh` in front of the real one says where to look instead.
    options = f"-o IdentityFile={folder}/client -o IdentitiesOnly=yes -o UserKnownHostsFile={folder}/known_hosts"
    wrapper = bin_folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(ssh)} -F /dev/null {options} "$@"\n')
    wrapper.chmod(0o755)


def _configuration(folder: Path) -> str:
    lines = {
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "yes",
        "SetEnv": f'"HOME={folder}" "XDG_CACHE_HOME={folder / DEVICE}" "OMP_NUM_THREADS=1"',
    }
    return "".join(f"{name} {value}\n" for name, value in lines.items())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text(errors='replace').strip()[-300:]}")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"sshd does not listen: {log.read_text(errors='replace')[-300:]}")
