"""The cluster that other tests trust: what it can do, and that it leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import SlurmCluster, SlurmError, hosts, unavailable
from tests.support.slurm_cluster.hosts import inhabitants

CLI = [sys.executable, "-m", "tests.support.slurm_cluster"]
SLEEP = "--wrap=exec sleep 600"


@pytest.fixture
def machine_untouched() -> Iterator[None]:
    """Fails if mounts, network interfaces or the host name are not as they were."""

    def state() -> tuple[str, list[str], str]:
        return Path("/proc/mounts").read_text(), os.listdir("/sys/class/net"), os.uname().nodename

    before = state()
    yield
    assert state() == before


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie has none
    except OSError:
        return False


def reaches(cluster: SlurmCluster, node: str, address: str, port: int) -> bool:
    command = ["timeout", "1", "bash", "-c", f"</dev/tcp/{address}/{port}"]
    return cluster.on_node(node, command, check=False).returncode == 0


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}")
    return path


# Up and down


@pytest.mark.usefixtures("machine_untouched")
def test_two_clusters_at_once_and_nothing_left() -> None:
    with SlurmCluster() as one, SlurmCluster(nodes=("alpha7", "gpu-b-02", "c")) as other:
        assert one.run(["hostname"]).stdout == "head\n"
        names = other.run(["srun", "--nodes=3", "hostname"]).stdout.split()
        assert sorted(names) == ["alpha7", "c", "gpu-b-02"]
        one.submit("--nodes=2", SLEEP)
        stray = subprocess.Popen([*hosts.enter(one.base, "head", Path("/")), "sleep", "600"])
        one.wait_until(lambda: len(one.processes("node1")) > 0, 10, "job")
        assert len(inhabitants(one.base)) >= 10
    assert stray.wait(timeout=5) == -signal.SIGKILL
    for cluster in (one, other):
        assert not inhabitants(cluster.base)
        assert not cluster.base.exists()


def test_nothing_left_when_it_does_not_come_up() -> None:
    cluster = SlurmCluster(extra_config="NoSuchOption=1")
    with pytest.raises(SlurmError, match="NoSuchOption"):
        cluster.up()
    assert not inhabitants(cluster.base)
    assert not cluster.base.exists()


@pytest.mark.usefixtures("machine_untouched")
def test_killed_runner_leaves_nothing() -> None:
    code = """
from tests.support.slurm_cluster import SlurmCluster
with SlurmCluster() as cluster:
    print(cluster.base, flush=True)
    cluster.submit("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600")
    cluster.run(["sleep", "600"], timeout_seconds=600)
"""
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with runner:
        assert runner.stdout is not None
        base = Path(runner.stdout.readline().strip())
        hosts.wait_until(lambda: hosts.user_processes(base, "node2"), 10, "job")
        time.sleep(0.2)  # for the command on the head
        pids = inhabitants(base)
        assert len(pids) >= 15
        runner.kill()
    hosts.wait_until(lambda: not base.exists(), 5, "end of the folder")
    hosts.wait_until(lambda: not any(is_alive(pid) for pid in pids), 5, "end of all processes")


def test_folder_must_be_its_own(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    with pytest.raises(ValueError, match="not empty"):
        SlurmCluster(tmp_path).up()
    assert (tmp_path / "theirs").exists()
    assert subprocess.run([*CLI, "down", tmp_path], capture_output=True).returncode == 2
    assert (tmp_path / "theirs").exists()
    with pytest.raises(ValueError, match="UNIX socket"):
        SlurmCluster(tmp_path / ("long" * 20)).up()


def test_command_line() -> None:
    up = subprocess.run([*CLI, "up", "--nodes=1"], capture_output=True, text=True, check=True)
    base = Path(up.stdout.splitlines()[0])
    try:
        use = f'eval "$({sys.executable} -m {CLI[2]} env {base})"; cd /usr; srun -N1 pwd; sinfo -h'
        shell = subprocess.run(["bash", "-c", use], capture_output=True, text=True, check=True)
        assert shell.stdout.startswith("/usr\ndebug*")
    finally:
        subprocess.run([*CLI, "down", base], check=True)
    assert not inhabitants(base)
    assert not base.exists()


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hosts.DAEMON_ENVIRONMENT, "PATH", "/nowhere")
    unavailable.cache_clear()
    reason = unavailable()
    unavailable.cache_clear()
    assert reason is not None
    assert "apt-get install iproute2 munge slurm-client slurmctld slurmd" in reason


# Jobs


def test_exit_status_and_environment(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_script = script(tmp_path, "srun bash -c 'echo $SLURM_CONF $GREETING' > out; exit 3")
    job_id = slurm.submit("--nodes=2", job_script, cwd=tmp_path, env={"GREETING": "hi"})
    job = slurm.wait_for_state(job_id, timeout_seconds=10)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0")
    assert job["WorkDir"] == str(tmp_path)
    assert (tmp_path / "out").read_text() == "/etc/slurm/slurm.conf hi\n" * 2


def test_callers_job_is_not_passed_on(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    assert "77" not in slurm.run(["env"]).stdout.split("SLURM_JOB_ID=")
    assert "SBATCH_PARTITION" not in slurm.environment


def test_signals(slurm: SlurmCluster, tmp_path: Path) -> None:
    text = """
trap 'echo batch >> heard' USR1
srun bash -c 'trap "echo step >> heard; exit 5" USR1; echo >> ready; sleep 600 & wait' &
while :; do wait $!; status=$?; [ $status -lt 128 ] && exit $status; done
"""
    job_id = slurm.submit(script(tmp_path, text), cwd=tmp_path)
    heard = tmp_path / "heard"
    slurm.wait_until((tmp_path / "ready").exists, 10, "step")
    slurm.signal_batch(job_id, "USR1")
    slurm.wait_until(heard.exists, 10, "signal at the batch shell")
    slurm.signal_steps(job_id, "USR1")
    job = slurm.wait_for_state(job_id, timeout_seconds=10)
    assert heard.read_text().split() == ["batch", "step"]
    assert job["ExitCode"] == "5:0"


def test_requeue_from_within(slurm: SlurmCluster, tmp_path: Path) -> None:
    text = """
echo life ${SLURM_RESTART_COUNT:-0} >> lives
if [ -z "$SLURM_RESTART_COUNT" ]; then scontrol requeue $SLURM_JOB_ID; sleep 60; fi
"""
    job_id = slurm.submit("--open-mode=append", script(tmp_path, text), cwd=tmp_path)
    job = slurm.wait_for_state(job_id, "COMPLETED", timeout_seconds=20)
    assert (tmp_path / "lives").read_text().splitlines() == ["life 0", "life 1"]
    assert job["Restarts"] == "1"


@pytest.mark.parametrize("mode", ["REQUEUE", "CANCEL"])
def test_preemption(mode: str, tmp_path: Path) -> None:
    with SlurmCluster(preempt_mode=mode, kill_wait_seconds=1) as cluster:
        config = cluster.run(["scontrol", "show", "config"]).stdout
        assert re.search(r"KillWait\s+= 1 sec", config)
        low = cluster.submit("--nodes=2", "--exclusive", SLEEP, cwd=tmp_path)
        cluster.wait_for_state(low, "RUNNING", timeout_seconds=10)
        cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", SLEEP, cwd=tmp_path)
        job = cluster.wait_for_state(low, ["PENDING", "PREEMPTED"], timeout_seconds=10)
        expected = {"REQUEUE": ("PENDING", "1"), "CANCEL": ("PREEMPTED", "0")}
        assert (job["JobState"], job["Restarts"]) == expected[mode]


def test_wait_says_what_the_logs_say(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = slurm.submit(SLEEP, cwd=tmp_path)
    with pytest.raises(SlurmError, match=rf"(?s)job {job_id} in.*slurmctld.log.*JobId={job_id}"):
        slurm.wait_for_state(job_id, "COMPLETED", timeout_seconds=0.5)
    slurm.run(["scancel", job_id])


# Nodes


def test_power_cut_and_orphans(tmp_path: Path) -> None:
    with SlurmCluster() as cluster:
        job_id = cluster.submit("--nodes=2", "--wrap=srun sleep 600", cwd=tmp_path)
        cluster.wait_until(lambda: cluster.processes("node2"), 10, "step on node2")
        (pid, command) = cluster.processes("node2")[0]
        assert command.endswith("sleep 600")
        node2 = (cluster.settings.addresses["node2"], 6818)
        assert reaches(cluster, "node1", *node2)
        cluster.power_off("node2")
        assert not cluster.processes("node2")
        assert not Path(f"/proc/{pid}").exists()
        assert cluster.processes("node1")
        with pytest.raises(SlurmError, match="node2 is off"):
            cluster.on_node("node2", ["true"])
        cluster.power_on("node2")
        assert reaches(cluster, "node1", *node2)
        job = cluster.wait_for_state(job_id, "PENDING", timeout_seconds=10)
        assert job["Restarts"] == "1"
        cluster.wait_until(lambda: not cluster.processes("node1"), 10, "end of the step on node1")
        jobcomp = (cluster.base / "log/jobcomp.txt").read_text()
        assert f"JobId={job_id} " in jobcomp
        assert "JobState=NODE_FAIL" in jobcomp
        cluster.run(["scancel", job_id])
        assert len(cluster.run(["srun", "--nodes=2", "hostname"]).stdout.split()) == 2


def test_unplugged_node_lives_on(slurm: SlurmCluster, tmp_path: Path) -> None:
    controller = (slurm.settings.addresses["head"], 6817)
    job_id = slurm.submit("--nodelist=node2", SLEEP, cwd=tmp_path)
    slurm.wait_until(lambda: slurm.processes("node2"), 10, "job")
    assert reaches(slurm, "node2", *controller)
    slurm.link_down("node2")
    assert not reaches(slurm, "node2", *controller)
    assert slurm.processes("node2")
    slurm.link_up("node2")
    slurm.wait_until(lambda: reaches(slurm, "node2", *controller), 5, "network")
    slurm.run(["scancel", job_id])
    slurm.wait_until(lambda: not slurm.processes("node2"), 10, "end of the job")


def test_controller_restart_and_drain(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = slurm.submit("--nodelist=node1", "--wrap=sleep 1", cwd=tmp_path)
    slurm.stop_controller()
    assert slurm.run(["scontrol", "ping"], check=False).returncode != 0
    slurm.start_controller()
    slurm.drain("node2", "a test")
    assert "DRAIN" in slurm.node("node2")["State"]
    assert slurm.node("node2")["Reason"].startswith("a test")
    slurm.resume("node2")
    assert slurm.node("node2")["State"] == "IDLE"
    assert slurm.wait_for_state(job_id, timeout_seconds=10)["JobState"] == "COMPLETED"


def test_orphans_are_reaped(slurm: SlurmCluster) -> None:
    slurm.on_node("node1", ["bash", "-c", "(sleep 0.2 &)"])
    time.sleep(0.4)
    assert " Z" not in slurm.on_node("node1", ["ps", "-A", "-o", "args,stat"]).stdout


RESOLVED = {
    # own name, other's name
    "resolve": ("10.99.0.11", "10.99.0.12"),
    "loopback": ("127.0.1.1", "10.99.0.12"),
    "none": ("", ""),
}


@pytest.mark.parametrize("names", RESOLVED)
def test_names(names: str) -> None:
    with SlurmCluster(names=names) as cluster:
        look_up = "import socket,sys; print(socket.gethostbyname(sys.argv[1]))"
        addresses = [
            cluster.on_node("node1", [sys.executable, "-c", look_up, name], check=False)
            for name in ("node1", "node2")
        ]
        assert tuple(answer.stdout.strip() for answer in addresses) == RESOLVED[names]
        if names == "none":
            assert "Name or service not known" in addresses[0].stderr
        assert len(cluster.run(["srun", "--nodes=2", "hostname"]).stdout.split()) == 2


def test_nodes_without_client_commands(tmp_path: Path) -> None:
    code = """
import shutil
commands = ("sbatch", "scontrol", "squeue", "scancel", "sacct", "srun")
print([name for name in commands if shutil.which(name)])
"""
    with SlurmCluster(client_commands_on_nodes=False) as cluster:
        asks = script(tmp_path, f"srun {sys.executable} -c '{code}' > out")
        cluster.wait_for_state(cluster.submit("--nodes=2", asks, cwd=tmp_path), "COMPLETED", 10)
        assert (tmp_path / "out").read_text() == "['srun']\n" * 2
        assert "scontrol" in cluster.run(["bash", "-c", "command -v scontrol"]).stdout


def test_fake_gpus() -> None:
    with SlurmCluster(gpus_per_node=4) as cluster:
        show = ["bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
        seen = cluster.run(["srun", "--nodes=2", "--gpus-per-node=2", *show]).stdout
        assert seen == "0,1\n0,1\n"
        seen = cluster.run(["srun", "--ntasks=2", "--gpus-per-task=1", *show]).stdout
        assert sorted(seen.split()) == ["0", "1"]
        with pytest.raises(SlurmError, match="not available"):
            cluster.run(["srun", "--gpus-per-node=5", *show])
