"""The second process on one run folder is told who holds it; a dead holder loses it."""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from distributed_lm import run_lock as module
from distributed_lm.errors import ConfigError
from distributed_lm.run_lock import LOCK_FILE, STALE_SECONDS, Life, LockLostError, run_lock

NO_JOB = Life(job=None)
ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 1, "started": "1"}
DEAD = {"started": "1"}  # a process of our number that is not us


def plant(run_dir: Path, silent_for: float = 0.0, name: str = LOCK_FILE, **said: Any) -> Path:
    """A lock as another process would have left it: this process's but for what is ``said``."""
    scratch = run_dir / "scratch"
    with run_lock(scratch, NO_JOB):
        content = json.loads((scratch / LOCK_FILE).read_text())
    scratch.rmdir()
    path = run_dir / name
    path.write_text(json.dumps({**content, "token": "planted", **said}))
    touched = path.stat().st_mtime - silent_for
    os.utime(path, (touched, touched))
    return path


def take(run_dir: Path, life: Life = NO_JOB) -> str | None:
    with run_lock(run_dir, life) as lock:
        lock.check()
        return lock.taken_over


def assert_refused(run_dir: Path, holder: str, life: Life = NO_JOB) -> None:
    with pytest.raises(ConfigError, match=f"is in use: {holder}"):
        take(run_dir, life)


def assert_taken_over(run_dir: Path, cause: str, life: Life = NO_JOB) -> None:
    assert f"({cause}" in (take(run_dir, life) or "")
    assert list(run_dir.iterdir()) == []


def test_second_holder_is_refused_by_name_and_first_releases(tmp_path: Path) -> None:
    with run_lock(tmp_path, Life("4711")) as lock:
        assert lock.taken_over is None
        with pytest.raises(ConfigError) as caught:
            take(tmp_path)
        message = str(caught.value)
        assert f"process {os.getpid()} on {socket.gethostname()}, job 4711, since 20" in message
    assert take(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path\n"
        "from distributed_lm.run_lock import Life, run_lock\n"
        f"with run_lock(Path({str(tmp_path)!r}), Life(None)): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert (tmp_path / LOCK_FILE).exists()
    taken_over = take(tmp_path)
    assert taken_over is not None
    assert "took over the lock of a dead run: process" in taken_over


def test_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    plant(tmp_path)
    assert_refused(tmp_path, f"process {os.getpid()} on")
    plant(tmp_path, started="1")
    assert_taken_over(tmp_path, "its process is gone")


def test_holder_on_another_host_lives_while_it_touches_the_file(tmp_path: Path) -> None:
    plant(tmp_path, STALE_SECONDS - 10, **ELSEWHERE)
    assert_refused(tmp_path, "process 1 on elsewhere")
    plant(tmp_path, STALE_SECONDS + 10, **ELSEWHERE)
    assert_taken_over(tmp_path, "silent for")


@pytest.mark.parametrize("started", ["1", None])
def test_process_number_of_another_namespace_says_nothing(
    tmp_path: Path, started: str | None
) -> None:
    """One host name, one boot: containers beside each other. The number is a living process's here
    (``None``) or a dead one's, and neither is the holder."""
    said = {"pid_namespace": 1, **({"started": started} if started else {})}
    plant(tmp_path, STALE_SECONDS - 10, **said)
    assert_refused(tmp_path, "process")
    plant(tmp_path, STALE_SECONDS + 10, **said)
    assert_taken_over(tmp_path, "silent for")


def test_numbers_of_a_foreign_proc_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "readlink", lambda path: "1")  # /proc/self, as another namespace's
    plant(tmp_path, started="1")
    assert_refused(tmp_path, "process")


def test_hidden_process_is_judged_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, /proc mounted with hidepid: no file in /proc, but a signal is not allowed."""

    def not_permitted(pid: int, signal: int) -> None:
        raise PermissionError

    said = {"pid": 2**22 + 1, "started": "1"}  # more than the kernel gives
    monkeypatch.setattr(os, "kill", not_permitted)
    plant(tmp_path, STALE_SECONDS - 10, **said)
    assert_refused(tmp_path, "process")
    plant(tmp_path, STALE_SECONDS + 10, **said)
    assert_taken_over(tmp_path, "silent for")


def test_holder_from_before_the_boot_is_dead_but_not_its_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 50.0)  # seconds since the boot
    plant(tmp_path, silent_for=45, boot="another")
    assert_refused(tmp_path, "process")
    plant(tmp_path, silent_for=55, boot="another")
    assert_taken_over(tmp_path, "its machine was restarted")


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_silence_is_measured_by_the_file_servers_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    def stamped_by_the_server(descriptor: int) -> None:
        os.utime(descriptor, (time.time() + ahead,) * 2)

    plant(tmp_path, STALE_SECONDS - 10 - ahead, **ELSEWHERE)
    monkeypatch.setattr(os, "fsync", stamped_by_the_server)
    assert_refused(tmp_path, "process 1 on elsewhere")
    plant(tmp_path, STALE_SECONDS + 10 - ahead, **ELSEWHERE)
    assert_taken_over(tmp_path, "silent for")


def test_later_life_of_the_same_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", -1.0)
    for life in (Life("7", restart=1), Life("7", restart=2, step=0), Life("7", restart=1, step=2)):
        plant(tmp_path, job="7", restart=1, step=3, **ELSEWHERE)
        if life.restart == 2:
            assert_taken_over(tmp_path, "an earlier life of this job", life)
        else:
            assert_refused(tmp_path, "process 1 on elsewhere, job 7", life)
    plant(tmp_path, job="7", restart=1, step=3, **ELSEWHERE)
    assert_refused(tmp_path, "process 1", Life("7", restart=1, step=3))
    assert_refused(tmp_path, "process 1", Life("8", restart=2))
    assert_taken_over(tmp_path, "an earlier life of this job", Life("7", restart=1, step=4))
    plant(tmp_path, job=None, **ELSEWHERE)
    assert_refused(tmp_path, "process 1", Life(None, restart=1))


def test_batch_job_waits_for_a_holder_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    path = plant(tmp_path, job="6", **ELSEWHERE)
    timer = threading.Timer(0.3, path.unlink)
    timer.start()
    assert take(tmp_path, Life("7")) is None
    timer.join()
    said = capsys.readouterr().err
    assert "is in use: process 1 on elsewhere, job 6" in said
    assert said.count("waiting up to 200 s") == 1
    plant(tmp_path, STALE_SECONDS - 0.3, job="6", **ELSEWHERE)
    assert_taken_over(tmp_path, "silent for 180 s", Life("7"))


def test_batch_job_waits_for_no_process_that_it_sees_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    plant(tmp_path)
    assert_refused(tmp_path, "process", Life("7"))


def test_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    with run_lock(tmp_path, NO_JOB):
        path = tmp_path / LOCK_FILE
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_foreign_lock_is_neither_touched_nor_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    foreign = plant(tmp_path, silent_for=100, name="foreign", **ELSEWHERE)
    touched = foreign.stat().st_mtime
    with run_lock(tmp_path, NO_JOB) as lock:
        os.replace(foreign, tmp_path / LOCK_FILE)
        time.sleep(0.3)
        with pytest.raises(LockLostError, match="process 1 on elsewhere"):
            lock.check()
    assert (tmp_path / LOCK_FILE).stat().st_mtime == touched


def test_fence_names_who_took_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_lock(tmp_path, Life("7", restart=0)) as first:
        first.check()
        monkeypatch.setattr(socket, "gethostname", lambda: "node2")
        with run_lock(tmp_path, Life("7", restart=1)) as second:
            with pytest.raises(LockLostError, match=r"in use by process \d+ on node2, job 7"):
                first.check()
            second.check()
        with pytest.raises(LockLostError, match="nobody holds it now"):
            first.check()
    assert LockLostError.exit_code == 1


def test_lock_that_cannot_be_read_is_not_lost(tmp_path: Path) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    with run_lock(run_dir, NO_JOB) as lock:
        run_dir.rename(moved)
        lock.check()  # the mount is gone
        run_dir.mkdir()
        (run_dir / LOCK_FILE).mkdir()
        lock.check()  # reading is an OSError
        (run_dir / LOCK_FILE).rmdir()
        with pytest.raises(LockLostError):
            lock.check()


def test_hanging_file_system_does_not_keep_the_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELEASE_SECONDS", 0.2)
    path = tmp_path / LOCK_FILE
    before = set(threading.enumerate())
    with run_lock(tmp_path, NO_JOB):
        (heart,) = set(threading.enumerate()) - before
        path.unlink()
        os.mkfifo(path)  # opening it hangs
    assert heart.is_alive()
    assert heart.daemon
    writer = os.open(path, os.O_RDWR)  # the file system comes back
    path.unlink()
    os.close(writer)
    heart.join(10)
    assert not heart.is_alive()


def test_lock_that_is_being_taken_over_is_not_released(tmp_path: Path) -> None:
    with run_lock(tmp_path, NO_JOB):
        token = json.loads((tmp_path / LOCK_FILE).read_text())["token"]
        plant(tmp_path, name=f".{LOCK_FILE}.takeover.{token}")
    assert (tmp_path / LOCK_FILE).exists()


def test_lock_that_is_being_released_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by the job's next life: the unlink would hit the new lock."""
    monkeypatch.setattr(module, "WAIT_SECONDS", -1.0)
    look = module._has_token
    outcomes = []

    def look_and_meet_the_next_life(path: Path, token: str) -> bool:
        monkeypatch.setattr(module, "_has_token", look)
        found = look(path, token)
        try:
            outcomes.append(take(tmp_path, Life("7", restart=1)))
        except ConfigError:
            outcomes.append("refused")
        return found

    with run_lock(tmp_path, Life("7")):
        monkeypatch.setattr(module, "_has_token", look_and_meet_the_next_life)
    assert outcomes == ["refused"]
    assert list(tmp_path.iterdir()) == []


def test_removed_folder_is_not_made_again(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run", NO_JOB):
        (tmp_path / "run").rename(tmp_path / "moved")
    assert not (tmp_path / "run").exists()


def test_living_claimant_is_respected_and_a_dead_one_is_not(tmp_path: Path) -> None:
    plant(tmp_path, **DEAD)
    claim = f".{LOCK_FILE}.takeover.planted"
    plant(tmp_path, name=claim, token="claimant", **ELSEWHERE)
    assert_refused(tmp_path, "process 1 on elsewhere")
    plant(tmp_path, name=claim, token="claimant", **DEAD)
    assert_taken_over(tmp_path, "its process is gone")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "elsewhere", "pid": 1}'])
def test_lock_that_says_little_is_judged_by_its_heartbeat(tmp_path: Path, content: str) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(content)
    assert_refused(tmp_path, "process")
    os.utime(path, (1.0, 1.0))
    assert_taken_over(tmp_path, "silent for")


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="cannot be written"):
            take(folder)


def test_of_many_starters_one_takes_over(tmp_path: Path) -> None:
    """Processes that stumble before every step, on a dead lock, in half of the rounds with the
    claim of a starter that died taking it over."""
    rounds = [tmp_path / f"{number:02d}" for number in range(20)]
    for number, run_dir in enumerate(rounds):
        run_dir.mkdir()
        plant(run_dir, **DEAD)
        if number % 2:
            plant(run_dir, name=f".{LOCK_FILE}.takeover.planted", token="claimant", **DEAD)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(6), context.Queue()
    starters = [
        context.Process(target=start_each, args=(rounds, barrier, results), daemon=True)
        for _ in range(barrier.parties)
    ]
    for starter in starters:
        starter.start()
    outcomes = [results.get(timeout=60) for _ in starters for _ in rounds]
    for starter in starters:
        starter.join()
    for run_dir in rounds:
        winners = [pid for name, pid, refusal in outcomes if name == run_dir.name and not refusal]
        refusals = [refusal for name, _, refusal in outcomes if name == run_dir.name and refusal]
        assert len(winners) == 1, (run_dir.name, winners, refusals)
        assert all(f"is in use: process {winners[0]} on" in refusal for refusal in refusals)
        assert list(run_dir.iterdir()) == []


def start_each(rounds: list[Path], barrier: Barrier, results: Any) -> None:
    """In one of the processes: try to hold each folder; report (folder, process, refusal)."""
    sys.addaudithook(stumble)
    for run_dir in rounds:
        barrier.wait(30)
        refusal = None
        try:
            with run_lock(run_dir, NO_JOB) as lock:
                barrier.wait(30)
                lock.check()
                barrier.wait(30)
        except ConfigError as error:
            refusal = str(error)
            barrier.wait(30)
            barrier.wait(30)
        except LockLostError:
            barrier.wait(30)
        results.put((run_dir.name, os.getpid(), refusal))


def stumble(event: str, arguments: tuple[Any, ...]) -> None:
    is_step = event in ("os.link", "os.rename", "os.remove")
    if is_step or (event == "open" and LOCK_FILE in str(arguments[0])):
        time.sleep(random.random() * 0.003)
