"""What devices and the links between them can do, and what a cluster file says of them."""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import PositiveFloat, PositiveInt

from distributed_lm.errors import ConfigError
from distributed_lm.planner.activations import Device

Precision = Literal["fp32", "bf16", "fp16"]
CLUSTERS = Path("configs/clusters")


@dataclass(frozen=True)
class DeviceRates:
    """Peaks of one device, and the share of them that long kernels reach."""

    name: str
    peaks: dict[Precision, float]
    """FLOP/s that MFU is a fraction of, by precision: dense, or measured on a CPU."""
    memory_bandwidth: float
    """Bytes per second."""
    node_bandwidth: float
    """To the other devices of the node, bytes per second and direction."""
    network_bandwidth: float
    """This device's share of the node's network, bytes per second and direction."""
    matmul_efficiency: float
    """Share of the peak in a model's matrix products; of GPUs calibrated in bf16, see
    docs/planning.md."""
    device: Device = "cuda"


def _gpu_peaks(tensor_cores: float, fp32: float) -> dict[Precision, float]:
    return {"bf16": tensor_cores, "fp16": tensor_cores, "fp32": fp32}


# Peaks: NVIDIA's data sheets of H100 SXM, H200 SXM and A100 80 GB SXM (dense; fp32 without tensor
# cores, since TF32 stays off). Links: NVLink 4 and 3, half of the advertised sum of both
# directions; network: the DGX H100 and DGX A100 data sheets, one 400 or 200 Gb/s adapter per GPU.
HOPPER, AMPERE = _gpu_peaks(989.4e12, 67e12), _gpu_peaks(312.0e12, 19.5e12)
DEVICES = {
    "H100": DeviceRates("H100", HOPPER, 3.35e12, 450e9, 50e9, 0.549),
    "H200": DeviceRates("H200", HOPPER, 4.8e12, 450e9, 50e9, 0.549),
    "A100": DeviceRates("A100", AMPERE, 2.04e12, 300e9, 25e9, 0.724),
}


class NodeShape(pydantic.BaseModel):
    """What the planner reads of a cluster file; the launcher's schema has the rest, so that only
    what looks like one of these fields is an error."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    nodes: PositiveInt = 1
    """Nodes of a run, unless ``--nodes`` says otherwise."""
    devices_per_node: PositiveInt
    """Ranks per node: its GPUs, or how many processes share its CPUs."""
    device: Literal["gpu", "cpu"] = "gpu"
    device_memory_gb: PositiveFloat | None = None
    """Of one device (of a CPU node: its memory over ``devices_per_node``), for the memory check."""
    device_model: Literal["H100", "H200", "A100"] | None = None
    """For ``distributed-lm plan``, whose rates to calculate with; off = H100's."""


def cluster_path(name: str) -> Path:
    """The file of a path, with or without ``.yaml``, or of a name in ``configs/clusters``."""
    path = Path(name)
    if path.suffix:
        return path
    return (CLUSTERS if path.name == name else path.parent) / f"{path.name}.yaml"


def load_node_shape(name: str) -> NodeShape:
    """From the cluster file that ``cluster_path`` finds.

    Raises:
        ConfigError: naming the file and the field.
    """
    path = cluster_path(name)
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such cluster file; configs/clusters/ has some to start from"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'field: value' lines, found a {type(values).__name__}")
    for field in values.keys() - NodeShape.model_fields:
        for meant in difflib.get_close_matches(str(field), NodeShape.model_fields, 1, 0.8):
            raise ConfigError(f"{path}: {field}: no such field; write {meant}")
    try:
        return NodeShape.model_validate(values)
    except pydantic.ValidationError as error:
        problem: Any = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"{path}: {field}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        ) from None


def rates_of(shape: NodeShape) -> DeviceRates:
    """Of one device of the cluster; a CPU is measured, here and now, over its processes."""
    if shape.device == "gpu":
        return DEVICES[shape.device_model or "H100"]
    return measured_cpu(shape.devices_per_node)


def measured_cpu(processes: int) -> DeviceRates:
    """One of ``processes`` that share this machine: an fp32 product and a copy in numpy."""
    import numpy as np

    matrix = np.ones((768, 768), dtype=np.float32)
    product = min(_seconds(lambda: matrix @ matrix) for _ in range(3))
    source = np.ones(1 << 23, dtype=np.float32)
    target = np.empty_like(source)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))
    bandwidth = 2 * source.nbytes / copy / processes
    # Processes of one machine exchange through memory: written, read, and copied out again.
    peak = 2 * 768**3 / product / processes
    peaks: dict[Precision, float] = {"fp32": peak, "bf16": peak, "fp16": peak}
    return DeviceRates("CPU, measured", peaks, bandwidth, bandwidth / 3, 1e9, 0.8, "cpu")


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
