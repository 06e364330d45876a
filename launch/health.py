"""``python -m launch.health RUN_DIR DEVICES BYTES``: one task per node; tells the supervisor how
the node is, and reduces a tensor with the nodes that are well.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.task import interface_of, supervisor_host

PACKAGES = ("torch", "megatron-core", "deepspeed")
MATRIX_SIZE = 256
REDUCE_BYTES = 16 << 20


def main() -> None:
    run_dir, devices, needed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    host, port = supervisor_host(), int(os.environ["DISTRIBUTED_LM_SUPERVISOR_PORT"])
    line = socket.create_connection((host, port), timeout=60.0)
    interface = interface_of(str(line.getsockname()[0]))
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    rank = int(os.environ["DISTRIBUTED_LM_HEALTH_RANK"])
    token = os.environ["DISTRIBUTED_LM_SUPERVISOR_TOKEN"]
    _say(line, {"token": token, "rank": rank, "host": socket.gethostname()})
    _say(line, {"report": examine(run_dir, devices, needed), "clock": time.time()})
    for answer in line.makefile():
        message = json.loads(answer)
        if "meet" in message:
            _say(line, {"report": meet(**message["meet"])})
            return


def examine(run_dir: Path, devices: int, needed: int) -> dict[str, Any]:
    """Versions, and the first thing that is wrong with this node under ``problem``."""
    report: dict[str, Any] = {"python": sys.version.split()[0], "code": code_hash(_code_folder())}
    for package in PACKAGES:
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "missing"
    report["problem"] = _disk_problem(run_dir, needed) or _device_problem(devices)
    return report


def code_hash(folder: Path) -> str:
    """Of all Python files of the two packages, by name and content."""
    digest = hashlib.sha256()
    for package in ("distributed_lm", "launch"):
        for path in sorted((folder / package).rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _code_folder() -> Path:
    return Path(__file__).resolve().parents[1]


def _disk_problem(run_dir: Path, needed: int) -> str | None:
    job = os.environ.get("SLURM_JOB_ID", "")
    draft = run_dir / "slurm" / f".health.{socket.gethostname()}.{job}"
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w") as file:
            file.write("x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        moved = draft.with_name(f"{draft.name}.renamed")
        os.replace(draft, moved)
        moved.unlink()
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        return f"{run_dir} cannot be written here ({error.strerror})"
    if free < needed:
        return f"{run_dir} has {free / 1e9:.1f} GB left, the run needs {needed / 1e9:.1f} GB"
    return None


def _device_problem(devices: int) -> str | None:
    import torch

    found = torch.cuda.device_count()
    if found < devices:
        return f"{found} of {devices} devices are seen"
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE, generator=generator)
    expected = (matrix.double() @ matrix.double()).float()
    for device in [f"cuda:{number}" for number in range(devices)] or ["cpu"]:
        try:
            product = (matrix.to(device) @ matrix.to(device)).cpu()
        except RuntimeError as error:
            return f"{device} does not compute ({str(error).splitlines()[0]})"
        if not torch.allclose(product, expected, rtol=1e-2, atol=1.0):
            return f"{device} computes wrong: {(product - expected).abs().max():.3g} off"
    return None


def meet(rank: int, world_size: int, address: str, port: int, seconds: float) -> dict[str, Any]:
    """Reduce a tensor with the other nodes, within ``seconds``: whether its sum is right, and the
    bandwidth of the ring algorithm."""
    import torch
    import torch.distributed as dist

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo", init_method=f"tcp://{address}:{port}", rank=rank,
            world_size=world_size, timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        values = torch.full((REDUCE_BYTES // 4,), float(rank + 1), device=device)
        dist.all_reduce(values)  # also the warm-up
        if float(values[0]) != world_size * (world_size + 1) / 2:
            return {"meeting": f"the all-reduce gave {float(values[0])}"}
        started = time.perf_counter()
        dist.all_reduce(values)
        if on_cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        dist.destroy_process_group()
    except RuntimeError as error:
        return {"meeting": str(error).splitlines()[0]}
    moved = 2 * (world_size - 1) / world_size * REDUCE_BYTES
    return {"gigabytes_per_second": moved / elapsed / 1e9}


def _say(line: socket.socket, message: dict[str, Any]) -> None:
    line.sendall((json.dumps(message) + "\n").encode())


if __name__ == "__main__":
    main()
