"""Our logits against those of ``transformers`` in a process that cannot import this package."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distributed_lm import process_groups
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.config import RunConfig
from distributed_lm.data.tokenizer import Tokenizer
from distributed_lm.errors import ConfigError, UserError
from distributed_lm.export.tokenizers import SAMPLE
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import parameter_shards
from distributed_lm.model.proof import prove_positions
from distributed_lm.process_groups import Process, ProcessGroups

TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit; fp32 rounding gives 1e-6 to
1e-5, wrong slopes or a wrong order of heads 1e-2 and more."""
SEQUENCES = 2
RELOAD = Path(__file__).with_name("reload.py")


class ComparisonError(UserError):
    """What was written is not the model that was to be exported."""

    exit_code = 1


@dataclass(frozen=True)
class Comparison:
    """What the fresh process found."""

    differences: dict[int, float]
    """Largest absolute difference of two logits, by length in tokens."""
    largest_logit: float
    same_tokens: bool
    """Whether its tokenizer gives the data set's ids for ``SAMPLE``."""
    adds_tokens: bool
    """Whether its tokenizer adds tokens of its own, which training did not."""
    transformers_version: str

    def check(self, folder: Path) -> None:
        """Raises ComparisonError, with the figure, unless all agrees."""
        limit = TOLERANCE * self.largest_logit
        for length, difference in self.differences.items():
            if not difference <= limit:  # NaN fails, too
                raise ComparisonError(
                    f"{folder}: at {length} tokens its logits differ from ours by up to "
                    f"{difference:.3g}, rounding allows {limit:.2g}; it is left there to be "
                    "looked at"
                )
        if not self.same_tokens:
            raise ComparisonError(
                f"{folder}: its tokenizer gives other ids than the data set's; it is left there "
                "to be looked at"
            )


def compare(
    config: RunConfig,
    step: int,
    vocab_size: int,
    lengths: tuple[int, ...],
    tokenizer: Tokenizer,
    folder: Path,
) -> Comparison:
    """Run the checkpoint here, then ``folder`` in a fresh process, in fp32 on random tokens.

    Args:
        vocab_size: rows of the embedding.
        tokenizer: of the data set; the tokens are below its vocabulary size.

    Raises:
        ComparisonError: if the folder cannot be loaded.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = {
        length: torch.randint(
            tokenizer.vocab_size, (SEQUENCES, length), generator=generator, dtype=torch.int64
        )
        for length in lengths
    }
    with tempfile.TemporaryDirectory(prefix="distributed_lm_") as work:
        logits = our_logits(config, step, vocab_size, tokens)
        tensors = {f"logits_{length}": values for length, values in logits.items()}
        tensors |= {f"tokens_{length}": values for length, values in tokens.items()}
        save_file(tensors, Path(work) / "ours.safetensors")
        request = {"text": SAMPLE, "ids": tokenizer.encode(SAMPLE).tolist()}
        (Path(work) / "text.json").write_text(json.dumps(request), encoding="utf-8")
        del logits, tensors
        found = _reload(folder, Path(work))
    differences = {int(length): value for length, value in found.pop("differences").items()}
    return Comparison(differences, **found)


def our_logits(
    config: RunConfig, step: int, vocab_size: int, tokens: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Logits [B, S, V] in fp32 on the CPU of a checkpoint's weights, by length of the input.

    Raises:
        UserError: if the checkpoint does not fit the config, or there is more than one process.
    """
    process = Process.from_environment()
    if process.world_size > 1:
        raise ConfigError(f"WORLD_SIZE={process.world_size}: start this command as one process")
    config = config.with_whole_model().model_copy(update={"precision": "fp32"})
    layout = Layout.grid(config.parallel, process.world_size)
    with process_groups.joined(config, process, layout) as groups:
        return _run(config, step, vocab_size, tokens, groups)


def _run(
    config: RunConfig,
    step: int,
    vocab_size: int,
    tokens: dict[int, Tensor],
    groups: ProcessGroups,
) -> dict[int, Tensor]:
    [stage] = build_stages(config, vocab_size, groups)
    blocks = model_blocks(parameter_shards([stage], groups), groups)
    store.load(config.run_dir, step, blocks, groups)
    stage.eval()
    prove_positions([stage], groups)
    with torch.no_grad():
        return {
            length: stage(tokens_BS.to(groups.device)).transpose(0, 1).float().cpu().contiguous()
            for length, tokens_BS in tokens.items()
        }


def _reload(folder: Path, work: Path) -> dict[str, Any]:
    """``-I``: without PYTHONPATH, the user's site folder and the current one."""
    command = [sys.executable, "-I", str(RELOAD), str(folder.resolve()), str(work)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ComparisonError(f"{folder}: transformers cannot load it: {reason[-1]}")
    answer = (work / "theirs.json").read_text(encoding="utf-8")
    return json.loads(answer)
