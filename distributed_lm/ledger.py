"""``distributed-lm ledger``: did two runs see the same tokens in the same updates? No torch."""

from pathlib import Path

from rich.console import Console

from distributed_lm.errors import DataError
from distributed_lm.tracking.metrics_file import parse_records


def ledger(first: Path, second: Path) -> bool:
    """Compare the data digests of two runs step by step and print the verdict.

    The digest of a step is a hash over the blocks of all updates up to it, so the first step where
    two runs differ is the first update that saw other tokens.

    Returns:
        Whether the runs agree on every step that both have recorded.

    Raises:
        DataError: if a run has no record, or the two share no step.
    """
    ours, theirs = read_digests(first), read_digests(second)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise DataError(
            f"{first} and {second} have recorded no common step; set train.log_every alike"
        )
    different = [step for step in common if ours[step] != theirs[step]]
    console = Console(soft_wrap=True, highlight=False)
    if not different:
        console.print(
            f"same tokens in every update up to step {common[-1]} "
            f"({len(common)} recorded steps compared, digest {ours[common[-1]][:16]})"
        )
        return True
    before = [step for step in common if step < different[0]]
    since = f"the same up to step {before[-1]}, " if before else ""
    console.print(
        f"{since}different from step {different[0]}: {ours[different[0]][:16]} in {first}, "
        f"{theirs[different[0]][:16]} in {second}"
    )
    return False


def read_digests(run_dir: Path) -> dict[int, str]:
    """step -> data digest, from ``metrics.jsonl``; what a rewound run did again counts last."""
    path = run_dir / "metrics.jsonl"
    try:
        records = parse_records(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run folder") from None
    return {
        int(record["step"]): str(record["data_digest"])
        for record in records
        if record["kind"] == "train"
    }
