"""``distributed-lm check``: is this machine ready for this config, and is the attention right?"""

from pathlib import Path

from rich.console import Console

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.checkpoint.folders import has_initial_weights, read_state
from distributed_lm.config import RunConfig
from distributed_lm.data.manifest import verify_manifest
from distributed_lm.data.tokenizer import tokenizer_of
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import GPTStage, build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.proof import Proof, prove_positions
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.preflight import Preflight, preflight
from distributed_lm.process_groups import Process, ProcessGroups


def check(config: RunConfig) -> None:
    """Report environment, devices and data, build the model and prove its positions; if the run has
    checkpoints, verify the newest and load it.

    One process alone checks the config for one replica of its layout and builds the model whole;
    started through ``python -m launch local … --command check``, every rank proves its own part.

    Raises:
        UserError: the first thing that would stop a run.
    """
    process = Process.from_environment()
    alone = process.world_size == 1
    replica = config.parallel.tensor * config.parallel.pipeline
    found = preflight(config, replica if alone else process.world_size)
    for corpus in found.corpora:
        verify_manifest(corpus.folder)
        tokenizer_of(corpus.folder, corpus.manifest)
    built = config.with_whole_model() if alone else config
    layout = Layout.grid(built.parallel, process.world_size)
    with process_groups.joined(built, process, layout) as groups:
        stages = build_stages(built, found.vocab_size, groups)
        initialize_weights(parameter_shards(stages, groups), built.model, built.seed)
        proof = prove_positions(stages, groups)
        checkpoint = _load_newest(config.run_dir, stages, groups)
    if process.rank == 0:
        _report(config, layout, found, proof, checkpoint)


def _load_newest(run_dir: Path, stages: list[GPTStage], groups: ProcessGroups) -> str | None:
    """What there is to say about the newest checkpoint that is whole, having loaded its weights."""
    step, damaged = store.newest_verified(run_dir, groups)
    if step == 0 and not has_initial_weights(run_dir):
        return None
    blocks = model_blocks(parameter_shards(stages, groups), groups)
    store.load(run_dir, step, blocks, groups)
    layout = read_state(run_dir, step)["layout"]
    whole = f"step {step}, saved on {layout}: hashes as in its manifest, its weights load here"
    return "; ".join([*damaged, whole])


def _report(
    config: RunConfig, proved: Layout, found: Preflight, proof: Proof, checkpoint: str | None
) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for name, value in platform.describe_environment().items():
        console.print(f"{name:<14} {value}")
    for corpus in found.corpora:
        console.print(
            f"{'data set':<14} {corpus.folder}: {corpus.train.tokens:,} training tokens in "
            f"{corpus.train.documents:,} documents, vocabulary {corpus.manifest.vocab_size}, "
            "hashes as in its manifest"
        )
    parameters = total_parameters(config.model, found.vocab_size)
    console.print(f"{'model':<14} {parameters:,} parameters, {config.precision}")
    console.print(f"{'layout':<14} {found.layout.describe()}")
    console.print(
        f"{'positions':<14} {config.model.position} proved against the fp64 reference on "
        f"{proved.describe()} with the {proof.backend} kernel: largest error "
        f"{proof.largest_error:.2g} nats (rounding allows {proof.tolerance:.2g}), fingerprint "
        f"{proof.fingerprint}"
    )
    if checkpoint is not None:
        console.print(f"{'checkpoint':<14} {checkpoint}")
    console.print("ready")
