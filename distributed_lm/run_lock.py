"""One run folder, one run: a lock file that says who is at work and that a dead holder loses.

Works on shared file systems: creating the file exclusively is atomic on NFS too. The holder touches
it twice a minute, so that a holder on another machine is known to be alive.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed_lm.errors import ConfigError

LOCK_FILE = "lock.json"
HEARTBEAT_SECONDS = 30.0
# A holder elsewhere that has not touched the file for this long is dead.
STALE_SECONDS = 600.0


@contextmanager
def run_lock(run_dir: Path, job: str | None) -> Iterator[str | None]:
    """Hold the run folder while the context is open.

    Args:
        job: the batch system's job id, for the message to others.

    Yields:
        A sentence about a stale lock that was taken over, or None.

    Raises:
        ConfigError: if a living process holds it: host, pid, job and since when.
    """
    path = run_dir / LOCK_FILE
    taken_over = _acquire(path, job)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heart.start()
    try:
        yield taken_over
    finally:
        stop.set()
        heart.join()
        path.unlink(missing_ok=True)


def _acquire(path: Path, job: str | None) -> str | None:
    taken_over = None
    if path.parent.exists() and not path.parent.is_dir():
        raise ConfigError(f"{path}: cannot be written, its folder is a file; choose another name")
    while True:
        try:
            _create(path, job)
        except FileExistsError:
            holder = _read(path)
            if holder is None:  # released between our two looks
                continue
            if _is_alive(path, holder):
                raise ConfigError(
                    f"{path.parent} is in use: {_describe(holder)}; wait for it, stop it, or "
                    "choose another name"
                ) from None
            taken_over = f"took over the lock of a dead run: {_describe(holder)}"
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}); choose another output_dir"
            ) from None
        else:
            return taken_over


def _create(path: Path, job: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "job": job,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    # Whole from the first instant: written aside, then linked to its name, which must be free.
    draft = path.with_name(f".{LOCK_FILE}.{content['host']}.{content['pid']}")
    draft.write_text(json.dumps(content), encoding="utf-8")
    try:
        os.link(draft, path)
    finally:
        draft.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {"host": "unknown", "pid": 0, "started": "", "job": None, "since": "unknown"}
    return holder


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        # The start time tells a process from a later one that was given the same number.
        return _process_start(int(holder["pid"])) == holder["started"]
    try:
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False


def _process_start(pid: int) -> str:
    """When the kernel started the process, in clock ticks since boot; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return fields[19] if fields[0] != "Z" else ""


def _describe(holder: dict[str, Any]) -> str:
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:  # a vanished mount: saving will say so
            continue
