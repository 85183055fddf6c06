"""The actor that looks at one node of a cluster.

It travels as source, and imports nothing of ours: it has to run on nodes where we are not installed, and say so.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any


class NodeProbe:
    """Answers questions about the node that it runs on."""

    def __init__(self) -> None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs from what asks for none
        self._listener: socket.socket | None = None

    def versions(self) -> dict[str, str]:
        """Version of each package that must be the same on all nodes; `missing` where there is none."""
        found = {"python": platform.python_version()}
        for name in ("ray", "torch"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "missing"
        return {**found, "sparsetrain": self._sources()}

    def gpus(self) -> dict[str, Any]:
        """What torch sees: number of GPUs, the first one's name, and the CUDA version of the build."""
        try:
            import torch
        except ImportError as error:
            return {"count": 0, "name": "", "cuda": f"torch cannot be imported: {error}"}
        count = torch.cuda.device_count()
        return {
            "count": count,
            "name": torch.cuda.get_device_name(0) if count else "",
            "cuda": torch.version.cuda or "",
        }

    def address(self) -> dict[str, str]:
        """The node's address in Ray, its host's name, and the network interface with that address."""
        import psutil
        import ray

        ip = ray.util.get_node_ip_address()
        names = [
            name for name, each in psutil.net_if_addrs().items() if any(a.address.partition("%")[0] == ip for a in each)
        ]
        return {"ip": ip, "host": socket.gethostname(), "interface": names[0] if names else ""}

    def clock(self) -> float:
        """Seconds since 1970, as this node believes."""
        return time.time()

    def listen(self) -> int:
        """Open a port, and return it."""
        self._listener = socket.create_server(("", 0))
        return int(self._listener.getsockname()[1])

    def reaches(self, ip: str, port: int) -> str:
        """Connect to a port of another node; returns what went wrong, or nothing."""
        try:
            socket.create_connection((ip, port), timeout=5).close()
        except OSError as error:
            return str(error)
        return ""

    def _sources(self) -> str:
        """What stands in both of our packages, in short."""
        digest = hashlib.sha256()
        for name in ("sparsetrain", "sparsetrain_kernels"):
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:
                return "missing"
            root = Path(spec.origin).resolve().parent
            for path in sorted(root.rglob("*.py")):
                digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return f"sources {digest.hexdigest()[:12]}"
