"""A real SuperLink on loopback for tests, with SuperNodes or simulated ones: started, used, ended by pid."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
APP = ROOT / "configs" / "dp_fedavg" / "flower_app"


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Deployment:
    """Processes of one federation and the address that ``flwr`` talks to."""

    def __init__(self, folder: Path, num_nodes: int, *, simulation: bool = False) -> None:
        self.folder, self.num_nodes, self.simulation = folder, num_nodes, simulation
        self.api, self.fleet, self.control = free_ports(3)
        self.processes: dict[str, subprocess.Popen] = {}
        # No test on another package's path, no thread pools, no proxies.
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def command(self, name: str) -> str:
        return str(Path(sys.executable).parent / name)

    def start(self, name: str, words: list[str]) -> subprocess.Popen:
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=self.env, cwd=ROOT, start_new_session=True
        )
        return self.processes[name]

    def start_superlink(self) -> None:
        words = [
            self.command("flower-superlink"),
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.api),
        ]
        words += ["--fleet-api-address", f"127.0.0.1:{self.fleet}"]
        words += ["--control-api-address", f"127.0.0.1:{self.control}"]
        words += ["--database", str(self.folder / "state.db"), "--disable-runtime-dependency-installation"]
        words += ["--simulation"] if self.simulation else []
        self.start("superlink", words)
        self.wait_for(self.api, "superlink")

    def start_supernode(self, number: int) -> None:
        words = [self.command("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{self.api}"]
        words += ["--port", str(free_ports(1)[0])]
        words += ["--node-config", f"partition-id={number} num-partitions={self.num_nodes}"]
        self.start(f"supernode-{number}", words)

    def wait_for(self, port: int, name: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()[-2000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.2)
        raise TimeoutError(f"{name} does not listen on {port}")

    def flwr(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.api}"\ninsecure = true\n'
        )
        return subprocess.run(
            [self.command("flwr"), *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env,
            cwd=ROOT,
            check=False,
        )

    def run_app(self, overrides: dict[str, object], timeout: float = 300) -> subprocess.CompletedProcess:
        text = " ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in overrides.items())
        words = ["run", str(APP), "here", "--run-config", text, "--stream"]
        if self.simulation:
            words += ["--federation-config", f"num_supernodes={self.num_nodes} init_args_num_cpus=2"]
        return self.flwr(*words, timeout=timeout)

    def stop(self, name: str, how: int = signal.SIGKILL) -> None:
        """End one process and its children; each has a session of its own."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        process.wait(timeout=30)


@contextlib.contextmanager
def deployment(folder: Path, num_nodes: int = 2, *, simulation: bool = False) -> Iterator[Deployment]:
    """A SuperLink and its SuperNodes (or its simulated ones), gone afterwards whatever happens."""
    found = Deployment(folder, num_nodes, simulation=simulation)
    try:
        found.start_superlink()
        for number in range(0 if simulation else num_nodes):
            found.start_supernode(number)
        yield found
    finally:
        for name in list(found.processes):
            found.stop(name)
