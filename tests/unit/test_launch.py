"""The launcher: what it starts, what it says when a rank fails, and that it passes signals on."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch import ports
from launch.environment import rank_variables, threads_per_process
from launch.failure import Failure, last_words, root_cause

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "runs" / "smoke.yaml"
FAKE = ROOT / "tests" / "support" / "fake_command.py"
TIMEOUT_SECONDS = 30

# Runs the launcher with the fake in place of `python -m distributed_lm`, in a process of its own:
# it takes over signals and writes to the real standard error.
LAUNCH_FAKE = f"""
import sys
from pathlib import Path
from launch.local import plan_local, run_plan

config, processes, behaviour, grace_seconds = sys.argv[1:]
plan = plan_local(
    Path(config), [], int(processes), "train", [behaviour], program=[sys.executable, {str(FAKE)!r}]
)
sys.exit(run_plan(plan, float(grace_seconds)))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"extends: [{SMOKE}]\noutput_dir: {tmp_path}\nbatch: {{global_batch_size: 12}}\n"
    )
    return path


def fake_command_line(
    config: Path, processes: int, behaviour: str, grace_seconds: float = 10.0
) -> list[str]:
    arguments = (config, processes, behaviour, grace_seconds)
    return [sys.executable, "-c", LAUNCH_FAKE, *map(str, arguments)]


def run_fake(
    config: Path, processes: int, behaviour: str, grace_seconds: float = 10.0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        fake_command_line(config, processes, behaviour, grace_seconds),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def run_launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


class TestPlan:
    def test_dry_run_is_quick_and_needs_no_torch(self) -> None:
        script = (
            "import atexit, sys\n"
            "atexit.register(lambda: print('loaded', 'torch' in sys.modules))\n"
            "from launch.__main__ import main\n"
            f"main(['local', {str(SMOKE)!r}, 'parallel.tensor=2', 'parallel.pipeline=2',"
            " '--dry-run', '--', '--some-option', '3'])\n"
        )
        before = children_cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        )
        assert children_cpu_seconds() - before < 1.0
        *commands, loaded = done.stdout.splitlines()
        assert loaded == "loaded False"
        assert len(commands) == 4
        for rank, command in enumerate(commands):
            assert f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 " in command
            assert command.endswith(
                f"-m distributed_lm train {SMOKE} parallel.tensor=2 parallel.pipeline=2"
                " --some-option 3"
            )

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["parallel.tensor=3"], "model.num_attention_heads=4"),
            (["parallel.tensor=2", "--processes", "3"], "3 processes are not a multiple"),
            (["--processes", "8"], "batch.global_batch_size=8 is not a multiple"),
        ],
    )
    def test_bad_layout_is_one_sentence(self, arguments: list[str], expected: str) -> None:
        done = run_launch("local", str(SMOKE), *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"error: {expected}")
        assert done.stderr.count("\n") == 1

    def test_run_folder_is_a_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(SMOKE.read_text())
        done = run_launch("local", str(tmp_path), "--command", "evaluate", "--dry-run")
        assert done.stdout.rstrip().endswith(f"-m distributed_lm evaluate {tmp_path}")

    def test_threads_share_the_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cores = len(os.sched_getaffinity(0))
        assert threads_per_process(1) == cores
        assert threads_per_process(10 * cores) == 1
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert rank_variables(0, 1, port=1)["OMP_NUM_THREADS"] == str(cores)
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert "OMP_NUM_THREADS" not in rank_variables(0, 1, port=1)


class TestOutput:
    @pytest.mark.parametrize("processes", [1, 2])
    def test_rank_0_has_the_terminal(self, config: Path, processes: int) -> None:
        done = run_fake(config, processes, "speak")
        assert done.returncode == 0
        assert done.stdout == "rank 0 speaks\n"
        assert done.stderr == "rank 0 warns\n"
        logs = config.parent / "smoke" / "logs"
        assert "rank 0 warns" in (logs / "rank_0.log").read_text()
        if processes == 2:
            assert "rank 1 speaks\nrank 1 warns\n" in (logs / "rank_1.log").read_text()

    def test_a_traceback_that_was_only_logged_is_shown(self, config: Path) -> None:
        done = run_fake(config, 1, "logs_a_traceback")
        assert done.returncode == 0
        assert done.stderr == "Traceback (most recent call last):\nValueError: survived\n"

    def test_unwritable_log_folder_is_one_sentence(self, config: Path) -> None:
        (config.parent / "smoke").write_text("a file in its place")
        done = run_launch("local", str(config))
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {config.parent}/smoke/logs: cannot write")
        assert done.stderr.count("\n") == 1


class TestFailure:
    @pytest.mark.parametrize(("behaviour", "rank"), [("one_fault", 1), ("rank_0_fault", 0)])
    def test_first_failing_rank_is_shown_once(
        self, config: Path, behaviour: str, rank: int
    ) -> None:
        done = run_fake(config, 3, behaviour)
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == 1
        assert done.stderr.count(f"ValueError: the loss of rank {rank}") == 1
        assert "Connection closed by peer" not in done.stderr
        assert f"launch: rank {rank} of 3 failed with exit code 1" in done.stderr
        assert f"logs/rank_{rank}.log" in done.stderr

    def test_mistake_is_one_sentence(self, config: Path) -> None:
        done = run_fake(config, 3, "mistake")
        assert done.returncode == 2
        assert done.stderr.count("error: data/x: no such data set") == 1

    def test_hanging_peers_are_ended(self, config: Path) -> None:
        started = time.monotonic()
        done = run_fake(config, 3, "one_fault_others_hang", grace_seconds=0.5)
        assert time.monotonic() - started < TIMEOUT_SECONDS / 2
        assert done.returncode == 3
        assert "rank 1 of 3 failed with exit code 3" in done.stderr

    def test_waiting_peers_may_end_well(self, config: Path) -> None:
        assert run_fake(config, 2, "one_fault_others_wait", grace_seconds=0.5).returncode == 3
        assert signals_of(config)[0] == ["ready", "SIGTERM"]

    def test_killed_rank_is_the_cause(self, config: Path) -> None:
        done = run_fake(config, 2, "killed")
        assert done.returncode == 128 + signal.SIGKILL
        assert "rank 1 of 2 was killed by SIGKILL" in done.stderr
        assert "Traceback" not in done.stderr

    def test_earlier_lives_in_the_log_are_not_quoted(self, config: Path) -> None:
        run_fake(config, 2, "one_fault")
        done = run_fake(config, 2, "killed")
        assert "the loss of rank 1" not in done.stderr
        assert "the loss of rank 1" in (config.parent / "smoke/logs/rank_1.log").read_text()


class TestLastWords:
    def test_prefix_noise_and_cause_of_an_exception(self) -> None:
        output = (
            "step 1\n"
            "[rank1]: Traceback (most recent call last):\n"
            '[rank1]:   File "a.py", line 1, in f\n'
            "[rank1]:     x()\n"
            "[rank1]: ValueError: two\n"
            "[rank1]: lines\n"
            "[rank1]:[W1122 13:00:00.1 ProcessGroup.cpp:1] Warning: destroy_process_group()\n"
        )
        assert last_words(output)[0] == "Traceback (most recent call last):"
        assert last_words(output)[-2:] == ["ValueError: two", "lines"]

    def test_without_a_traceback_the_last_lines(self) -> None:
        assert last_words("\n".join(map(str, range(100))))[-1] == "99"
        assert last_words("") == []

    def test_a_cause_beats_an_earlier_consequence(self) -> None:
        def failure(rank: int, code: int, output: str) -> Failure:
            return Failure(rank, code, float(rank), output, Path("log"))

        lost = "Traceback (most recent call last):\nRuntimeError: Connection reset by peer"
        own = "Traceback (most recent call last):\n  # connection reset by peer\nKeyError: 1"
        assert root_cause([failure(0, 1, lost), failure(1, 1, own)]).rank == 1
        assert root_cause([failure(0, 1, lost), failure(1, 1, "")]).rank == 1
        assert root_cause([failure(0, 1, lost), failure(1, -11, "")]).rank == 1
        assert root_cause([failure(0, 1, ""), failure(1, -11, "")]).rank == 1
        assert root_cause([failure(0, 1, lost), failure(1, 1, lost)]).rank == 0


class TestSignals:
    def test_every_rank_gets_every_signal_once(self, config: Path) -> None:
        with running(config) as launcher:
            launcher.send_signal(signal.SIGUSR1)
            wait_until(lambda: all("SIGUSR1" in notes for notes in signals_of(config)))
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(TIMEOUT_SECONDS) == 0  # every rank ended well
        assert signals_of(config) == [["ready", "SIGUSR1", "SIGTERM"]] * 2

    def test_ctrl_c_is_not_a_failure_of_a_rank(self, config: Path) -> None:
        with running(config) as launcher:
            launcher.send_signal(signal.SIGINT)
            _, error = launcher.communicate(timeout=TIMEOUT_SECONDS)
        assert launcher.returncode == 130
        assert error == "launch: stopped by SIGINT\n"

    def test_ranks_do_not_outlive_a_killed_launcher(self, config: Path) -> None:
        with running(config) as launcher:
            launcher.kill()
            wait_until(lambda: all(notes[-1:] == ["SIGTERM"] for notes in signals_of(config)))


@contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose two ranks wait for signals."""
    command_line = fake_command_line(config, 2, "wait_for_signals")
    with subprocess.Popen(
        command_line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            wait_until(lambda: signals_of(config) == [["ready"], ["ready"]])
            yield launcher
        finally:
            launcher.kill()


def children_cpu_seconds() -> float:
    """Of the processes this one has waited for: a busy machine does not change it, as the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def signals_of(config: Path) -> list[list[str]]:
    notes = [config.parent / f"signals_{rank}" for rank in range(2)]
    return [path.read_text().splitlines() if path.exists() else [] for path in notes]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_no_client_is_given_the_ranks_port() -> None:
    first_of_clients = 32768  # Linux, unless its administrator has other plans; macOS starts later
    assert 1024 <= ports.free_port() < first_of_clients
    assert max(ports.UNTRIED_PORTS) < first_of_clients


def test_a_port_that_is_listened_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken, other = listener.getsockname()[1], ports.free_port()
        monkeypatch.setattr(ports, "MEETING_PORTS", [taken, other])
        assert {ports.free_port() for _ in range(20)} == {other}
        monkeypatch.setattr(ports, "MEETING_PORTS", [taken])
        with pytest.raises(OSError, match="no free port"):
            ports.free_port()
