"""One run folder, one run: a lock file that says who is at work and that a dead holder loses.

Made of what is atomic on shared file systems, NFS included: ``os.link`` to a name that must be free
and ``os.replace``. The holder has a random token and touches the file every ``HEARTBEAT_SECONDS``.

Taking over the lock with token T: who links its draft to ``.lock.json.takeover.T`` has the claim on
T. It alone may rename the claim onto ``lock.json``, after seeing that this still holds T. The claim
is the new lock, so a kill in between leaves a lock like any other, whose dead maker loses it by the
same rule. Releasing takes the claim on our own token first: nobody takes over between look and
unlink.

What is left: a holder declared dead may live on (stopped, or behind a cut network); ``check`` tells
it. And a claimant that stops for ``STALE_SECONDS`` just before its rename may then rename another's
claim; who held the lock by then learns it from ``check``, too.
"""

import errno
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distributed_lm.errors import ConfigError, UserError

LOCK_FILE = "lock.json"
HEARTBEAT_SECONDS = 20.0
# A holder elsewhere that has not touched the file for this long is dead.
STALE_SECONDS = 180.0
# A batch job, which nobody restarts, waits this long for a holder elsewhere to end or to go stale.
WAIT_SECONDS = STALE_SECONDS + HEARTBEAT_SECONDS
POLL_SECONDS = 5.0
# A file system that hangs must not keep a finished run from ending.
RELEASE_SECONDS = 10.0


class LockLostError(UserError):
    """Another process took the run folder over: this one must not write there any more."""

    exit_code = 1


@dataclass(frozen=True)
class Life:
    """Which life of which batch job a process belongs to; a later one follows only a dead one."""

    job: str | None
    """None without a batch system."""
    restart: int = 0
    """How often the job has been requeued."""
    step: int = 0


@dataclass(frozen=True)
class _Holder:
    """What a lock file says; the defaults are for what it does not say."""

    token: str
    host: str = "unknown"
    pid: int = 0
    pid_namespace: int | None = None
    boot: str | None = None
    started: str | None = None
    job: str | None = None
    restart: int = 0
    step: int = 0
    since: str = "unknown"

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """A run folder that this process holds.

    Attributes:
        taken_over: a sentence about a dead run's lock that was taken over, or None.
    """

    def __init__(self, path: Path, me: _Holder, taken_over: str | None) -> None:
        self._path = path
        self._me = me
        self.taken_over = taken_over

    def check(self) -> None:
        """The fence: to be called before anything in the folder is replaced or removed.

        A file that cannot be read right now says nothing, and on a mount that hangs this hangs.

        Raises:
            LockLostError: if the lock is not ours any more; names whose it is.
        """
        try:
            holder = _read(self._path)[0]
        except FileNotFoundError:
            if not os.path.isdir(self._path.parent):  # a mount that vanished
                return
            now = "nobody holds it now"
        except OSError:
            return
        else:
            if holder.token == self._me.token:
                return
            now = f"it is in use by {holder}"
        raise LockLostError(
            f"{self._path.parent}: this run ({self._me}) lost its lock, {now}; it stops here so "
            "that it does not write over another run's work"
        )


@contextmanager
def run_lock(run_dir: Path, life: Life) -> Iterator[RunLock]:
    """Hold the run folder while the context is open.

    Raises:
        ConfigError: if a living process holds it: host, pid, job and since when. A batch job first
            waits ``WAIT_SECONDS`` for a holder whose death only its silence would show.
    """
    path = run_dir / LOCK_FILE
    me = _this_process(life)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{path}: cannot be written, its folder is a file; choose another name")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        taken_over = _acquire(path, me)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); choose another output_dir"
        ) from None
    stop = threading.Event()
    heart = threading.Thread(target=_keep, args=(path, me, stop), daemon=True)
    heart.start()
    try:
        yield RunLock(path, me, taken_over)
    finally:
        stop.set()
        heart.join(RELEASE_SECONDS)


def _keep(path: Path, me: _Holder, stop: threading.Event) -> None:
    """Touch the lock while it is ours, and release it in the end; of the file system's errors,
    saving will speak."""
    while not stop.wait(HEARTBEAT_SECONDS):
        # By its descriptor: the file that was read is the one that is touched.
        with suppress(OSError), path.open("rb") as file:
            if _parse(file.read()).token == me.token:
                os.utime(file.fileno())
    with suppress(OSError):
        _release(path, me)


def _acquire(path: Path, me: _Holder) -> str | None:
    deadline = time.monotonic() + WAIT_SECONDS
    is_told = False
    while True:
        with _draft(path, me) as draft:
            holder, taken_over = _seize(path, draft, me)
        if holder.token == me.token:
            return taken_over
        in_use = f"{path.parent} is in use: {holder}"
        if me.job is None or _is_here(holder, me) or time.monotonic() > deadline:
            raise ConfigError(f"{in_use}; wait for it, stop it, or choose another name")
        if not is_told:
            sys.stderr.write(f"{in_use}; waiting up to {WAIT_SECONDS:.0f} s for it\n")
            is_told = True
        time.sleep(POLL_SECONDS)


@contextmanager
def _draft(path: Path, me: _Holder) -> Iterator[Path]:
    """A lock written aside, so that it is whole when it gets its name."""
    draft = path.with_name(f".{LOCK_FILE}.draft.{me.token}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(me), file)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        with suppress(OSError):
            draft.unlink()


def _seize(name: Path, draft: Path, me: _Holder) -> tuple[_Holder, str | None]:
    """Give the draft this name if it is free or whoever has it is dead.

    Returns:
        Who has the name then, we or a living one; a sentence if it was taken over.
    """
    taken_over = None
    while True:
        holder, age = _link(draft, name)
        if holder.token == me.token:
            return holder, taken_over
        cause = _cause_of_death(holder, me, age)
        if cause is None:
            return holder, None
        claim = _claim(name, holder)
        claimant, _ = _seize(claim, draft, me)
        is_unchanged = _has_token(name, holder.token)
        if claimant.token != me.token:
            if is_unchanged:  # then only the claimant can change it
                return claimant, None
        elif is_unchanged:
            with suppress(FileNotFoundError):  # we stopped, and another took our claim for a dead's
                os.replace(claim, name)
                taken_over = f"took over the lock of a dead run: {holder} ({cause})"
        else:
            claim.unlink(missing_ok=True)


def _link(draft: Path, name: Path) -> tuple[_Holder, float]:
    """Who has the name after we tried to give it to the draft, and the seconds since it was last
    touched, by the file server's clock: it stamped the draft a moment ago."""
    while True:
        # Whether we did is read from the file: NFS may answer "exists" to its own repeated request.
        with suppress(FileExistsError):
            os.link(draft, name)
        try:
            holder, touched = _read(name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # released between our two looks
                raise
        else:
            return holder, draft.stat().st_mtime - touched


def _release(path: Path, me: _Holder) -> None:
    claim = _claim(path, me)
    try:
        # Empty: there is room for it on a full disk, and whoever finds it can judge it by age only.
        claim.touch(exist_ok=False)
    except FileExistsError:  # somebody is taking us over
        return
    try:
        if _has_token(path, me.token):
            path.unlink()
    finally:
        claim.unlink(missing_ok=True)


def _claim(path: Path, holder: _Holder) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.takeover.{holder.token}")


def _has_token(path: Path, token: str) -> bool:
    try:
        return _read(path)[0].token == token
    except FileNotFoundError:
        return False


def _read(path: Path) -> tuple[_Holder, float]:
    """A lock and when it was last touched. Opening also makes NFS ask its server anew."""
    with path.open("rb") as file:
        return _parse(file.read()), os.fstat(file.fileno()).st_mtime


def _parse(content: bytes) -> _Holder:
    known = {field.name for field in fields(_Holder)}
    # A file that is damaged, or of another version of us, has no token but its content.
    said: dict[str, Any] = {"token": hashlib.sha256(content).hexdigest()[:16]}
    with suppress(ValueError, AttributeError):
        said |= {key: value for key, value in json.loads(content).items() if key in known}
    return _Holder(**said)


def _cause_of_death(holder: _Holder, me: _Holder, age: float) -> str | None:
    """Why the holder cannot be at work any more; None if it may be."""
    is_same_job = me.job is not None and holder.job == me.job
    if is_same_job and (holder.restart, holder.step) < (me.restart, me.step):
        return "an earlier life of this job"
    if _is_here(holder, me):
        started = _process_start(holder.pid)
        if started is not None:
            return None if started == holder.started else "its process is gone"
    if holder.host == me.host and None not in (holder.boot, me.boot) and holder.boot != me.boot:
        # Touched after we booted: another machine of that name ("localhost").
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        if age > uptime:
            return "its machine was restarted"
    return f"silent for {age:.0f} s" if age > STALE_SECONDS else None


def _is_here(holder: _Holder, me: _Holder) -> bool:
    """Whether the holder's process number means the same process to us."""
    there, here = (holder.boot, holder.pid_namespace), (me.boot, me.pid_namespace)
    return None not in here and there == here


def _this_process(life: Life) -> _Holder:
    return _Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_namespace=_pid_namespace(),
        boot=_boot(),
        started=_process_start(os.getpid()),
        **asdict(life),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> int | None:
    """None also where /proc is that of another namespace: its numbers are not ours."""
    try:
        is_ours = os.readlink("/proc/self") == str(os.getpid())
        return os.stat("/proc/self/ns/pid").st_ino if is_ours else None
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When the kernel started the process, in clock ticks since boot, which tells it from a later
    one of the same number; empty if there is none, None if it is hidden from us (hidepid)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return None
    return stat[19] if stat[0] != "Z" else ""
