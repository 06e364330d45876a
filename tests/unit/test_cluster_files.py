"""Cluster files: what they may say, and what is said of mistakes in them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_lm.errors import ConfigError
from launch.cluster import Cluster, load_cluster, seconds_of

WORDS = ("partition", "account", "qos", "constraint", "gpu_type", "memory", "network_interface")
PATHS = ("venv", "shared", "scratch")
# Each would do harm, or be read as another option, if a shell or Slurm saw it as it is.
ATTACKS = (
    "$(touch X)", "`touch X`", "a; touch X", "a\ntouch X", "a\n#SBATCH --wrap=true", "a\n",
    "'; touch X; '", '"; touch X; "', "a\\\ntouch X", "a > X", "a\x00", "a\rb", "a #b",
)  # fmt: skip


def written(folder: Path, fields: dict[str, Any] | list[Any]) -> str:
    path = folder / "cluster.yaml"
    if isinstance(fields, dict):
        fields = {"devices_per_node": 1, **fields}
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def refusal(folder: Path, fields: dict[str, Any] | list[Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_cluster(written(folder, fields))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}/cluster.yaml: ")
    return message.removeprefix(f"{folder}/cluster.yaml: ")


@pytest.mark.parametrize("path", sorted(Path("configs/clusters").glob("*.yaml")), ids=str)
def test_shipped_files(path: Path) -> None:
    assert load_cluster(path.stem) == load_cluster(str(path))
    assert path.read_text().startswith("#"), "does not say what it is for"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"partitoin": "gpu"}, "partitoin: no such field; launch/cluster.py explains them all"),
        ({"container": {"kind": "apptainer"}}, "container.image: missing; add it"),
        ({"devices_per_node": 0}, "devices_per_node='0': input should be greater than 0"),
        ({"device": "tpu"}, "device='tpu': input should be 'gpu' or 'cpu'"),
        ({"time": 86400}, "time=86400: expected minutes, HH:MM:SS or D-HH:MM:SS, in quotes as in"),
        ({"time": "1 day"}, "time='1 day': expected minutes, HH:MM:SS or D-HH:MM:SS"),
        ({"scratch": "~/tmp"}, "scratch='~/tmp': expected a path from / on"),
        ({"sbatch_options": ["-A me"]}, "sbatch_options.0='-A me': expected an option as in --"),
        (
            {"environment": {"A B": {"value": "1", "reason": "x"}}},
            "environment.A B='A B': expected",
        ),
        ({"environment": {"A": {"value": "1"}}}, "environment.A.reason: missing; add it"),
        (["partition"], "expected 'field: value' lines, found"),
    ],
)
def test_mistakes_are_one_sentence(
    fields: dict[str, Any] | list[Any], said: str, tmp_path: Path
) -> None:
    assert refusal(tmp_path, fields).startswith(said)


def test_unknown_cluster_names_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere\.yaml: no such cluster file; there are: .*gene"
    ):
        load_cluster("nowhere")


def test_file_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    with pytest.raises(ConfigError, match=r"broken\.yaml: cannot be read"):
        load_cluster(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str, tmp_path: Path) -> None:
    for field in WORDS:
        assert refusal(tmp_path, {field: attack}).startswith(f"{field}=")
        assert refusal(tmp_path, {field: "gpu --wrap=true"}).startswith(f"{field}=")
    for field in PATHS:
        assert refusal(tmp_path, {field: f"/{attack}"}).startswith(f"{field}=")
    for field, value in (("modules", attack), ("srun_options", f"--{attack}")):
        assert refusal(tmp_path, {field: [value]}).startswith(f"{field}.0=")
    assert refusal(tmp_path, {"sbatch_options": [f"--comment={attack}"]})
    assert refusal(tmp_path, {"time": f"1{attack}"})
    assert refusal(tmp_path, {"container": {"kind": "pyxis", "image": attack}})
    inside = {"kind": "apptainer", "image": "/a.sif"}
    assert refusal(tmp_path, {"container": {**inside, "python": attack}})
    assert refusal(tmp_path, {"container": {**inside, "mounts": [f"/{attack}"]}})
    assert refusal(tmp_path, {"environment": {attack: {"value": "", "reason": "x"}}})


def test_reason_stays_in_its_comment(tmp_path: Path) -> None:
    fields = {"environment": {"A": {"value": "1", "reason": "x\ntouch X"}}}
    assert refusal(tmp_path, fields).startswith("environment.A.reason='x\\ntouch X': expected")


def test_what_real_clusters_say_is_taken() -> None:
    Cluster(
        devices_per_node=8,
        partition="gpu,gpu-long",
        constraint="[rack1|rack2]&h100*4",
        memory="200G",
        time="168:00:00",
        modules=("gcc/12.2", "cuda/12.8.1+x"),
        sbatch_options=("--exclude=node[01-03]", "--gres=nvme:1", "--mail-type=END,FAIL"),
        container={"kind": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.06-py3"},
    )


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("0", 0), ("90", 5400), ("1:30", 90), ("120:00", 7200), ("01:30:00", 5400),
        ("168:00:00", 604800), ("2-0", 172800), ("1-12", 129600), ("1-12:30", 131400),
        ("1-12:30:15", 131415),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
    Cluster(devices_per_node=1, time=time)


@pytest.mark.parametrize(
    "time", ["", "1h", "1:2", "-5", "1-", "1:00:00:00", "UNLIMITED", "30\n", "٣"]
)
def test_what_is_no_time(time: str) -> None:
    with pytest.raises(ConfigError, match="expected minutes, HH:MM:SS or D-HH:MM:SS"):
        seconds_of(time)
