"""How fast is a training step, against transformers' MPT and plain torch at the same shape?

    python -m benchmarks.train_step [--size cpu|tiny|1p3b] [--precision bf16] [--compile]

Every case trains the same shape on the same tokens: ALiBi, no biases, GELU, tied embedding. Ours
keeps fp32 master weights and accumulates in fp32 (DeepSpeed ZeRO 1); the others are given bf16
weights and nothing else, which is less work, and once fp32 weights under autocast, which is what
ours computes.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Ratio, Result
from benchmarks.plain_gpt import PlainGPT
from distributed_lm import platform, process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.pipeline import split_batch
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.training.engine import TrainingEngine

Step = Callable[[], Any]

# Model, sequence length, sequences per step, sequences per forward pass.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 4, "hidden": 256, "heads": 4, "vocab": 4096, "length": 256, "batch": 4},
    "cpu": {"layers": 8, "hidden": 512, "heads": 8, "vocab": 8192, "length": 512, "batch": 4},
    "1p3b": {"layers": 25, "hidden": 2048, "heads": 16, "vocab": 51200, "length": 1024, "batch": 8},
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "1p3b" if platform.has_cuda() else "cpu"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), nargs="+", default=["bf16", "fp32"]
    )
    parser.add_argument("--micro-batch", type=int, help="sequences per forward pass; default: all")
    parser.add_argument("--cases", nargs="+", help="default: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our config")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def config_of(options: argparse.Namespace, precision: str) -> RunConfig:
    """Ours, with ``--set`` applied."""
    from omegaconf import OmegaConf

    size = SIZES[options.size]
    values = {
        "name": "train_step",
        "precision": precision,
        "model": {
            "num_layers": size["layers"],
            "hidden_size": size["hidden"],
            "num_attention_heads": size["heads"],
            "vocab_size": size["vocab"],
            "bias": False,
        },
        "data": {"path": "unused", "sequence_length": size["length"]},
        "batch": {
            "global_batch_size": size["batch"],
            "micro_batch_size": options.micro_batch or size["batch"],
        },
        # Alone, in fp32, there is nothing to shard and no master copy to keep.
        "zero": {"stage": 0 if precision == "fp32" else 1},
        "train": {"steps": 1},
        "optimizer": {"learning_rate": 1e-4},
    }
    merged = OmegaConf.merge(values, OmegaConf.from_dotlist(options.set))
    return RunConfig.model_validate(OmegaConf.to_container(merged))


def tokens_of(config: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S]."""
    generator = torch.Generator().manual_seed(1)
    shape = (config.batch.global_batch_size, config.data.sequence_length + 1)
    vocab_size = config.model.vocab_size or 0
    tokens = torch.randint(0, vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@functools.lru_cache(maxsize=1)
def join() -> ProcessGroups:
    """Once: engines of both precisions live in one process."""
    config = config_of(parser().parse_args([]), "fp32")
    return process_groups.start(config, Process.from_environment(), Layout.of(config, 1))


def ours(config: RunConfig) -> Step:
    groups = join()
    vocab_size = config.model.vocab_size or 0
    stages = build_stages(config, vocab_size, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    engine = TrainingEngine(config, stages, groups)
    batches = split_batch(*tokens_of(config, groups.device), config.batch.micro_batch_size)
    return lambda: engine.train_step(batches, 1e-4)


def of_torch(
    config: RunConfig, model: torch.nn.Module, loss_of: Callable[..., Tensor], autocast: bool
) -> Step:
    """A step with torch's fused AdamW."""
    device = harness.device()
    dtype = torch.float32 if autocast else platform.DTYPES[config.precision]
    model = model.to(device=device, dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    batches = split_batch(*tokens_of(config, device), config.batch.micro_batch_size)

    def step() -> float:
        losses = []
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = loss_of(model, batch.tokens_BS, batch.labels_BS) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(losses))

    return step


def mpt(config: RunConfig, autocast: bool = False) -> Step:
    from transformers import MptConfig, MptForCausalLM

    shape = config.model
    model = MptForCausalLM(
        MptConfig(
            d_model=shape.hidden_size,
            n_heads=shape.num_attention_heads,
            n_layers=shape.num_layers,
            max_seq_len=config.data.sequence_length,
            vocab_size=shape.vocab_size,
            use_cache=False,
        )
    )

    def loss_of(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return of_torch(config, model, loss_of, autocast)


def plain(config: RunConfig, autocast: bool = False, compiled: bool = False) -> Step:
    model = PlainGPT(config.model, config.model.vocab_size or 0, config.data.sequence_length)
    called: Any = torch.compile(model) if compiled else model
    return of_torch(config, model, lambda _, *inputs: called(*inputs), autocast)


def compiled(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": True})})


CASES: dict[str, Callable[[RunConfig], Step]] = {
    "ours": ours,
    "ours, compiled": lambda config: ours(compiled(config)),
    "transformers MPT": mpt,
    "transformers MPT, autocast": lambda config: mpt(config, autocast=True),
    "plain torch": plain,
    "plain torch, compiled": lambda config: plain(config, compiled=True),
}


def cases_of(options: argparse.Namespace, precision: str) -> list[str]:
    names = options.cases or list(CASES)
    return [name for name in names if precision != "fp32" or "autocast" not in name]


def split_names(names: list[str]) -> tuple[list[str], list[str]]:
    """Cases that are ours, and the rest."""
    mine = [name for name in names if name.startswith("ours")]
    return mine, [name for name in names if name not in mine]


def measure(options: argparse.Namespace) -> Result:
    device = harness.device()
    result = Result("train_step", device)
    for precision in options.precision:
        _measure(options, precision, result)
    return result


def _measure(options: argparse.Namespace, precision: str, result: Result) -> None:
    config, device = config_of(options, precision), result.device
    names = cases_of(options, precision)
    matmul, matmul_flops = harness.matmul_case(device, platform.DTYPES[precision])
    steps = {name: CASES[name](config) for name in names}
    samples = harness.alternate({**steps, "matmul": matmul}, options.rounds, device, warmup=2)
    flops = training_flops_per_token(
        config.model, config.model.vocab_size or 0, config.data.sequence_length
    )
    peak = matmul_flops / samples["matmul"].median
    result.ceilings[f"matrix product {precision}, GFLOP/s"] = peak / 1e9
    tokens = config.tokens_per_step
    for name in names:
        rate = tokens / samples[name].median
        low, high = (tokens / seconds for seconds in reversed(samples[name].quartiles()))
        result.rows.append(
            {
                "case": name,
                "precision": precision,
                "tokens/s": rate,
                "quartiles": f"{low:,.0f}-{high:,.0f}",
                "of matrix product, full": rate * flops.full / peak,
                "of matrix product, causal": rate * flops.causal / peak,
                "where the time goes": parts_of(steps[name], device),
                "memory MiB": "" if options.no_memory else memory_of(options, precision, name),
            }
        )
    ours_first, others = split_names(names)
    for mine in ours_first:
        for name in others:
            result.ratios[f"{mine} / {name}, {precision}"] = samples[name].ratio_to(samples[mine])
    shares = [
        flops.full * tokens * other / (matmul_flops * own)
        for own, other in zip(samples[names[0]].seconds, samples["matmul"].seconds, strict=True)
    ]
    result.ratios[f"{names[0]} / matrix product, {precision}"] = Ratio.of(shares)


def memory_of(options: argparse.Namespace, precision: str, name: str) -> float:
    """MiB that building, compiling and two steps took on top of what imports did, in a process of
    its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--size", options.size]
    command += ["--precision", precision, "--memory-of", name]
    command += ["--micro-batch", str(options.micro_batch)] if options.micro_batch else []
    command += ["--set", *options.set] if options.set else []
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(printed.splitlines()[-1]))


def print_memory(options: argparse.Namespace) -> None:
    import transformers.models.mpt.modeling_mpt  # noqa: F401  every case pays for all imports

    config = config_of(options, options.precision[0])
    platform.give_back_freed_tensors()
    join()
    torch.ones(512, 512) @ torch.ones(512, 512)  # the libraries' own buffers

    def build_and_train() -> None:
        step = CASES[options.memory_of](config)
        step()
        step()

    print(harness.peak_memory_bytes(build_and_train, harness.device()) / 2**20)  # noqa: T201


# Substrings of operator names, in the order they are tried.
PARTS = {
    "loss": ("nll_loss", "log_softmax", "cross_entropy"),
    "attention": ("attention", "flex", "softmax", "bmm"),
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn", "aten::linear", "gemm"),
    "optimizer": ("_fused_adamw", "Optimizer", "clip"),
    "communication": ("c10d", "gloo", "nccl"),
}


def parts_of(step: Step, device: torch.device) -> str:
    """Where the time of a step goes: each operator's own time, by its name or else by that of the
    operator that called it."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + ([activity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    totals: Counter[str] = Counter()
    for event in profiler.events():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        totals[_part_of(event)] += own
    whole = sum(totals.values()) or 1
    return ", ".join(f"{part} {own / whole:.0%}" for part, own in totals.most_common())


def _part_of(event: Any) -> str:
    while event is not None:
        for part, words in PARTS.items():
            if any(word in event.name for word in words):
                return part
        event = event.cpu_parent
    return "rest"


if __name__ == "__main__":
    if "--memory-of" in sys.argv:
        print_memory(harness.arguments(parser()))
    else:
        harness.main(parser(), measure)
