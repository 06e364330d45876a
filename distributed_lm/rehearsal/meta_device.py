"""DeepSpeed on tensors without memory.

Its engine moves the model to "the accelerator's device", and ZeRO 3 compacts the weights through
host memory. Here the device is ``meta``, and the compacting is done there.
"""

from typing import Any

import torch
from deepspeed import accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero import parameter_offload, stage3
from torch import Tensor

META = torch.device("meta")


class MetaAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU, but with the dtypes of a GPU, and with everything on ``meta``."""

    def device_name(self, device_index: int | None = None) -> str:
        return "meta"

    def device(self, device_index: int | None = None) -> torch.device:
        return META

    def current_device(self) -> str:
        return "meta"

    def current_device_name(self) -> str:
        return "meta"

    def is_fp16_supported(self) -> bool:
        return True


def install() -> None:
    """For the rest of this process."""
    accelerator.set_accelerator(MetaAccelerator())
    stage3.defragment = _defragment


def forget(engine: Any) -> None:
    """Else DeepSpeed keeps every model that it was ever given."""
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()


def _defragment(tensors: list[Tensor]) -> Tensor:
    """``deepspeed.runtime.zero.utils.defragment`` without its detour over the CPU: makes the
    tensors slices, in order, of one new buffer, which it returns."""
    buffer = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype)
    offset = 0
    for tensor in tensors:
        tensor.data = buffer.to(META).narrow(0, offset, tensor.numel())
        offset += tensor.numel()
    return buffer
