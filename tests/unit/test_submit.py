"""What ``launch slurm`` would submit: the scripts, and that no value in them is read as a command.

To renew a golden script after a change that is meant to move it: delete it and run the test, which
writes what is missing, and fails.
"""

import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_lm.config import load_config
from distributed_lm.errors import ConfigError
from launch.__main__ import main
from launch.cluster import Cluster, load_cluster
from launch.health import code_hash
from launch.plan import Submission, plan_submission
from launch.script import Wishes
from launch.submit import SubmitError, submit
from launch.supervisor.job import Job
from launch.supervisor.step import srun_command, task_environment
from tests.unit.test_cluster_files import ATTACKS

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/runs/smoke.yaml"
PAPER = ROOT / "configs/runs/alibi_1p3b_L1024.yaml"
GOLDEN = ROOT / "tests/golden/slurm"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

# Every field of a cluster file but the container, of which there are two kinds.
EVERYTHING: dict[str, Any] = {
    "partition": "gpu,gpu-long",
    "account": "lm",
    "qos": "high",
    "constraint": "[rack1|rack2]",
    "exclusive": True,
    "nodes": 2,
    "devices_per_node": 4,
    "device": "gpu",
    "device_memory_gb": 80,
    "device_model": "H100",
    "gpu_type": "h100",
    "cpus_per_task": 12,
    "memory": "500G",
    "time": "2-12",
    "modules": ["gcc/12.2", "cuda/12.8"],
    "venv": "/shared/my envs/lm",
    "network_interface": "ib0",
    "environment": {
        "NCCL_IB_HCA": {"value": "mlx5_0:1", "reason": "the other port is Ethernet"},
        "GREETING": {"value": "it's $HOME", "reason": "to be quoted"},
    },
    "shared": "/shared",
    "scratch": "/local/scratch",
    "commands_on_nodes": True,
    "preemption_requeues": True,
    "lead_seconds": 300,
    "health_check": False,
    "sbatch_options": ["--reservation=lm", "--mail-type=END,FAIL"],
    "srun_options": ["--mpi=none"],
}
CONTAINERS: dict[str, dict[str, Any]] = {
    "apptainer": {
        "kind": "apptainer", "image": "/shared/lm.sif", "mounts": ["/opt/site:/opt/site:ro"],
        "python": "/opt/bin/python3",
    },
    "pyxis": {
        "kind": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.06-py3", "mounts": ["/opt/site"],
    },
}  # fmt: skip
MADE: dict[str, dict[str, Any]] = {
    "made_venv": EVERYTHING,
    "made_apptainer": {**EVERYTHING, "container": CONTAINERS["apptainer"]},
    "made_pyxis": {**EVERYTHING, "container": CONTAINERS["pyxis"]},
}
SHIPPED = sorted(path.stem for path in (ROOT / "configs/clusters").glob("*.yaml"))


def plan(
    data: Path,
    cluster: Cluster,
    *overrides: str,
    config: Path = PAPER,
    wishes: Wishes | None = None,
) -> Submission:
    fixed = [f"data.path={data}", "output_dir=/shared/runs"]
    return plan_submission(config, [*fixed, *overrides], cluster, wishes or Wishes())


def with_fields(**fields: Any) -> Cluster:
    return Cluster.model_validate({"devices_per_node": 1, "device": "cpu", **fields})


def refusal(arguments: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """What ``python -m launch`` says to what it refuses: one sentence."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ")


class TestGoldenScripts:
    @pytest.fixture(params=[*SHIPPED, *MADE])
    def script(self, request: pytest.FixtureRequest, demo_data: Path) -> tuple[str, str]:
        """The name of a cluster, and its script with the paths of this machine replaced."""
        name = request.param
        cluster = Cluster.model_validate(MADE[name]) if name in MADE else load_cluster(name)
        config = SMOKE if name == "local_test" else PAPER
        submission = plan(demo_data, cluster, config=config)
        text = submission.script.replace(submission.job.code_hash, "CODE")
        return name, text.replace(sys.executable, "/venv/bin/python")

    def test_script_is_the_golden_one(self, script: tuple[str, str]) -> None:
        name, text = script
        path = GOLDEN / f"{name}.sbatch"
        if not path.exists():
            path.write_text(text)
            pytest.fail(f"{path} is new: read it, and commit it")
        assert text == path.read_text()

    def test_shell_understands_it(self, script: tuple[str, str]) -> None:
        said = subprocess.run(
            ["bash", "-n"], input=script[1], capture_output=True, text=True, timeout=30
        )
        assert (said.returncode, said.stderr) == (0, "")

    @pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install '.[test]' brings it")
    def test_shellcheck_finds_nothing(self, script: tuple[str, str]) -> None:
        assert SHELLCHECK is not None
        said = subprocess.run(
            # Of quoted values in which a $ is meant as it is, shellcheck is not sure.
            [SHELLCHECK, "--exclude=SC2016", "-"],
            input=script[1],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert said.stdout == ""
        assert said.returncode == 0

    def test_none_is_left_over(self) -> None:
        assert {path.stem for path in GOLDEN.glob("*.sbatch")} == {*SHIPPED, *MADE}

    def test_the_made_ones_use_every_field(self) -> None:
        assert {*EVERYTHING, "container"} == set(Cluster.model_fields)


class Sandbox:
    """Runs a script with a ``module`` and a Python that only note what they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.venv = folder / "my venv"
        self.work.mkdir()
        for name, path in (("module", folder / "bin"), ("python", self.venv / "bin")):
            path.mkdir(parents=True)
            stub = path / name
            # Each argument and each variable ends in a NUL, as nothing inside of one can.
            stub.write_text(
                f'#!/bin/sh\nprintf "%s\\0" "$@" >> "{folder}/{name}.said"\n'
                f'env -0 > "{folder}/env"\n'
            )
            stub.chmod(stub.stat().st_mode | stat.S_IXUSR)

    def run(self, script: str) -> None:
        path = self.folder / "run.sbatch"
        path.write_text(script)
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.work)}
        done = subprocess.run(
            ["bash", path], cwd=self.work, env=environment, capture_output=True, timeout=30
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert os.listdir(self.work) == [], "the script has done something else"

    def said_to(self, name: str) -> list[str]:
        return (self.folder / f"{name}.said").read_bytes().decode().split("\0")[:-1]

    @property
    def environment(self) -> dict[str, str]:
        pairs = (self.folder / "env").read_bytes().decode().split("\0")[:-1]
        return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


class TestScriptRuns:
    def test_it_sets_up_and_becomes_the_supervisor(self, sandbox: Sandbox, demo_data: Path) -> None:
        cluster = Cluster.model_validate({**EVERYTHING, "venv": str(sandbox.venv)})
        submission = plan(demo_data, cluster)
        sandbox.run(submission.script)
        assert sandbox.said_to("module") == ["load", "gcc/12.2", "load", "cuda/12.8"]
        job_file = "/shared/runs/alibi_1p3b_L1024/slurm/job.json"
        assert sandbox.said_to("python") == ["-m", "launch.supervisor", job_file]
        environment = sandbox.environment
        assert environment["NCCL_IB_HCA"] == "mlx5_0:1"
        assert environment["GREETING"] == "it's $HOME"
        assert environment["TMPDIR"] == "/local/scratch"
        assert environment["PYTHONPATH"] == submission.job.code

    @pytest.mark.parametrize("attack", [one for one in ATTACKS if "\x00" not in one])
    def test_value_of_a_variable_is_only_that(
        self, attack: str, sandbox: Sandbox, demo_data: Path
    ) -> None:
        environment = {"VALUE": {"value": attack, "reason": "$(touch X); `touch X` 'quoted"}}
        cluster = with_fields(venv=str(sandbox.venv), environment=environment)
        sandbox.run(plan(demo_data, cluster, config=SMOKE).script)
        assert sandbox.environment["VALUE"] == attack

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_overrides_and_wishes_do_not_reach_it(
        self, attack: str, sandbox: Sandbox, demo_data: Path
    ) -> None:
        cluster = with_fields(venv=str(sandbox.venv))
        harmless = plan(demo_data, cluster, config=SMOKE)
        # In quotes, as YAML wants it; OmegaConf itself refuses what is no YAML.
        quoted = yaml.safe_dump(attack, default_style='"', width=1000).strip()
        wishes = Wishes(alert_command=attack, mail=attack)
        attacked = plan(
            demo_data, cluster, f"tracking.project={quoted}", config=SMOKE, wishes=wishes
        )
        assert attacked.config.tracking.project == attack
        assert attacked.script == harmless.script
        sandbox.run(attacked.script)


class TestRefusals:
    @pytest.mark.parametrize("attack", ATTACKS)
    def test_name_and_folder(
        self, attack: str, demo_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        command = ["slurm", SMOKE, "--cluster", "local_test", f"data.path={demo_data}"]
        quoted = yaml.safe_dump(attack, default_style='"', width=1000).strip()
        assert "name=" in refusal([*command, f"name={quoted}"], capsys)
        folder = yaml.safe_dump(f"{tmp_path}/{attack}", default_style='"', width=1000).strip()
        if "\x00" not in attack:  # no path at all
            assert "output_dir: " in refusal([*command, f"output_dir={folder}"], capsys)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", ["a%b", "a b", "a:b"])
    def test_folder_that_slurm_or_python_would_split(self, name: str, demo_data: Path) -> None:
        with pytest.raises(ConfigError, match=r"output_dir: .* choose another folder"):
            plan(demo_data, with_fields(), f"output_dir=/shared/{name}", config=SMOKE)

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_cluster_file(
        self, attack: str, demo_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """One field is enough: test_cluster_files.py has them all."""
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump({"devices_per_node": 1, "partition": attack}))
        command = ["slurm", SMOKE, "--cluster", path, f"data.path={demo_data}"]
        assert "partition=" in refusal([*command, "--dry-run"], capsys)

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_time(self, attack: str, demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["slurm", SMOKE, "--cluster", "local_test", f"data.path={demo_data}"]
        assert refusal([*command, f"--time=1{attack}"], capsys).startswith("time=")

    def test_model_that_does_not_fit(
        self, demo_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        config = tmp_path / "7b.yaml"
        config.write_text(f"extends: [{SMOKE}, {ROOT}/configs/models/7b.yaml]\nprecision: bf16\n")
        cluster = tmp_path / "small.yaml"
        cluster.write_text("devices_per_node: 2\ndevice_memory_gb: 24\n")
        command = ["slurm", config, "--cluster", cluster, f"data.path={demo_data}"]
        command += [f"output_dir={tmp_path}/runs"]
        assert refusal(command, capsys) == (
            "model: weights, gradients and optimizer state need 79.8 GB on each device with data=2 "
            "tensor=1 pipeline=1 and zero.stage=1, activations and buffers 1.0 GB more; a device "
            "has 24 GB; raise zero.stage, parallel.tensor or the number of nodes\n"
        )
        assert not (tmp_path / "runs").exists()

    def test_layout_that_does_not_divide(
        self, demo_data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["slurm", SMOKE, "--cluster", "local_test", f"data.path={demo_data}"]
        said = refusal([*command, "--nodes=3"], capsys)
        assert "batch.global_batch_size=8 is not a multiple" in said

    def test_time_too_short_to_save_in(self, demo_data: Path) -> None:
        with pytest.raises(ConfigError, match=r"time=3:00 is 180 s, and a run stops to save 180 s"):
            plan(demo_data, with_fields(), config=SMOKE, wishes=Wishes(time="3:00"))

    def test_folder_that_not_all_nodes_see(self, demo_data: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"set output_dir=/lustre/runs"):
            plan(demo_data, with_fields(shared="/lustre"), config=SMOKE)
        (tmp_path / "lustre").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "lustre")
        shared = f"{tmp_path}/link"
        plan(demo_data, with_fields(shared=shared), f"output_dir={shared}/runs", config=SMOKE)

    def test_image_that_only_this_folder_knows(self, demo_data: Path) -> None:
        container = {"kind": "apptainer", "image": "lm.sif"}
        with pytest.raises(ConfigError, match=r"container.image='lm.sif': expected a path from /"):
            plan(demo_data, with_fields(container=container), config=SMOKE)


class TestJob:
    """What the supervisor is told."""

    def test_time_of_0_is_no_limit(self, demo_data: Path) -> None:
        assert plan(demo_data, with_fields(time="0"), config=SMOKE).job.time_seconds is None

    def test_numbers_of_nodes_on_which_it_can_go_on(self, demo_data: Path) -> None:
        job = plan(demo_data, with_fields(nodes=4), config=SMOKE).job
        assert job.legal_nodes == [4, 2, 1]
        split = plan(demo_data, with_fields(nodes=4), "parallel.tensor=2", config=SMOKE).job
        assert split.legal_nodes == [4, 2]

    def test_network_interface_reaches_the_ranks(self, demo_data: Path) -> None:
        def variables(**fields: Any) -> dict[str, str]:
            job = plan(demo_data, with_fields(**fields), config=SMOKE).job
            found = task_environment(job, 1, "token", ["a"])
            return {name: value for name, value in found.items() if "SOCKET_IFNAME" in name}

        assert variables() == {}
        both = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
        assert variables(network_interface="ib0") == both
        own = {"NCCL_SOCKET_IFNAME": {"value": "=ib1", "reason": "not the bond"}}
        found = variables(network_interface="ib0", environment=own)
        assert found == {**both, "NCCL_SOCKET_IFNAME": "=ib1"}

    def test_apptainer_shows_what_the_run_needs(self, demo_data: Path) -> None:
        command = self.command(demo_data, "apptainer")
        inside = command[command.index("apptainer") :]
        binds = [part for before, part in pairwise(inside) if before == "--bind"]
        run = "/shared/runs/alibi_1p3b_L1024"
        assert binds == [run, str(demo_data), "/local/scratch", "/opt/site:/opt/site:ro"]
        image = inside.index("/shared/lm.sif")
        assert "--nv" in inside[:image]
        assert inside[image + 1 :] == ["/opt/bin/python3", "-m", "launch.task"]

    def test_pyxis_shows_what_the_run_needs(self, demo_data: Path) -> None:
        command = self.command(demo_data, "pyxis")
        assert "--container-image=nvcr.io#nvidia/pytorch:25.06-py3" in command
        [mounts] = [part for part in command if part.startswith("--container-mounts=")]
        paths = ["/shared/runs/alibi_1p3b_L1024", demo_data, "/local/scratch", "/opt/site"]
        assert mounts == "--container-mounts=" + ",".join(f"{path}:{path}" for path in paths)
        assert command[-3:] == ["python3", "-m", "launch.task"]
        assert "--mpi=none" in command

    def test_ranks_get_their_share_of_the_cores(self, demo_data: Path) -> None:
        assert "--cpus-per-task=12" in self.command(demo_data, "venv")
        assert plan(demo_data, with_fields(), config=SMOKE).job.srun_options == []

    @staticmethod
    def command(data: Path, kind: str) -> list[str]:
        job = plan(data, Cluster.model_validate(MADE[f"made_{kind}"])).job
        return srun_command(job, ["a", "b"], 4, "log", "launch.task")


class TestLoginNode:
    def test_dry_run_is_quick_writes_nothing_and_needs_no_torch(
        self, demo_data: Path, tmp_path: Path
    ) -> None:
        script = (
            "import atexit, sys\n"
            "atexit.register(lambda: print('loaded', 'torch' in sys.modules))\n"
            "from launch.__main__ import main\n"
            f"main(['slurm', {str(SMOKE)!r}, 'data.path={demo_data}', 'output_dir={tmp_path}/runs',"
            " '--cluster', 'local_test', '--dry-run'])\n"
        )
        before = children_cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PATH": ""}, timeout=60,
        )  # fmt: skip
        assert children_cpu_seconds() - before < 1.0
        assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=smoke\n")
        assert "\nlegal_nodes: [2, 1]\n" in done.stdout
        *_, verdict, loaded = done.stdout.splitlines()
        assert verdict == "# sbatch --test-only: there is no sbatch here"
        assert loaded == "loaded False"
        assert os.listdir(tmp_path) == []

    def test_supervisor_needs_nothing_but_the_standard_library(self) -> None:
        """With a container it runs on the node's own Python."""
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import launch.supervisor.__main__\n"
            "roots = {name.partition('.')[0] for name in sys.modules}\n"
            "print(roots - set(sys.stdlib_module_names) - {'__main__'})\n"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "{'launch'}\n", done.stderr

    def test_what_is_submitted_is_what_was_planned(
        self, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submission = plan(demo_data, with_fields(), f"output_dir={tmp_path}", config=SMOKE)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SubmitError, match="run this on a login node"):
            submit(submission)
        job = submission.job
        assert code_hash(Path(job.code)) == job.code_hash
        assert (Path(job.code) / "slurm/run.sbatch").exists()
        assert Job.read(job.slurm_dir / "job.json") == job
        assert load_config(job.slurm_dir / "config.yaml") == submission.config
        assert submission.script_path.read_text() == submission.script
        assert job.log_dir.is_dir(), "Slurm writes no log into a folder that is not there"


def children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
