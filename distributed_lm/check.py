"""``distributed-lm check``: is this machine ready for this config, and is the attention right?"""

from rich.console import Console

from distributed_lm import platform, process_groups
from distributed_lm.config import RunConfig
from distributed_lm.data.manifest import Manifest, read_manifest
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages, check_vocab_size, padded_vocab_size
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.proof import Proof, prove_positions
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.process_groups import Process


def check(config: RunConfig) -> None:
    """Report environment, devices and data, build the model and prove its positions.

    With fewer processes than the layout needs, the model is built whole on each of them.

    Raises:
        UserError: the first thing that would stop a run.
    """
    process = Process.from_environment()
    platform.check_precision(config.precision)
    manifests = [read_manifest(corpus.path) for corpus in config.data.corpora]
    vocab_size = padded_vocab_size(config.model, manifests[0].vocab_size)
    check_vocab_size(config, vocab_size, manifests[0].vocab_size)
    if process.world_size == 1:
        alone = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False}
        parallel = config.parallel.model_copy(update=alone)
        config = config.model_copy(update={"parallel": parallel})
    layout = Layout.grid(config.parallel, process.world_size)
    groups = process_groups.start(config, process, layout)
    try:
        stages = build_stages(config, vocab_size, groups)
        initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
        proof = prove_positions(stages, groups)
    finally:
        process_groups.stop()
    if process.rank == 0:
        _report(config, layout, vocab_size, manifests, proof)


def _report(
    config: RunConfig, layout: Layout, vocab_size: int, manifests: list[Manifest], proof: Proof
) -> None:
    console = Console()
    for name, value in platform.describe_environment().items():
        console.print(f"{name:<14} {value}")
    for corpus, manifest in zip(config.data.corpora, manifests, strict=True):
        split = manifest.splits["train"]
        console.print(
            f"{'data set':<14} {corpus.path}: {split.tokens:,} training tokens in "
            f"{split.documents:,} documents, vocabulary {manifest.vocab_size}"
        )
    parameters = total_parameters(config.model, vocab_size)
    console.print(f"{'model':<14} {parameters:,} parameters, {config.precision}")
    console.print(f"{'layout':<14} {layout.describe()}")
    console.print(
        f"{'positions':<14} {config.model.position} proved against the fp32 reference with the "
        f"{proof.backend} kernel: largest error {proof.largest_error:.2g} nats "
        f"(rounding allows {proof.tolerance:.2g}), fingerprint {proof.fingerprint}"
    )
    console.print("ready")
