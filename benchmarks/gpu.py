"""Everything that needs a GPU, in one command: the kernels against the reference, then the
benchmarks, then ``docs/benchmarks.md``. Builds and downloads nothing; under ten minutes on an H100.

    python -m benchmarks.gpu
"""

import importlib.util
import subprocess
import sys
import time

from rich.console import Console

from distributed_lm import platform

# ALiBi: ragged blocks, grouped queries, the second tensor-parallel rank's slopes.
PARITY = "(alibi and (1000 or grouped)) or a_later_tensor_parallel_rank"
STEPS: tuple[tuple[str, ...], ...] = (
    ("pytest", "-q", "tests/gpu/test_kernels_gpu.py", "-m", "gpu", "-k", PARITY),
    ("benchmarks.attention",),
    ("benchmarks.train_step", "--precision", "bf16"),
    ("benchmarks.claims",),
    ("benchmarks.report",),
)
SECONDS_EACH = 420


def main() -> int:
    """The exit code: 2 without a GPU, 1 if a step failed; the others run nevertheless."""
    console = Console(stderr=True)
    if not platform.has_cuda():
        console.print("error: torch sees no CUDA device; run this where there is a GPU")
        return 2
    failed = []
    for step in STEPS:
        started = time.perf_counter()
        problem = _run(step)
        seconds = time.perf_counter() - started
        console.print(f"{step[0]}: {problem or 'done'} after {seconds:.0f} s")
        if problem:
            failed.append(step[0])
    if failed:
        console.print(f"error: did not finish: {', '.join(failed)}")
    return 1 if failed else 0


def _run(step: tuple[str, ...]) -> str:
    """What went wrong, or nothing. In a process of its own: each begins with an empty GPU."""
    if importlib.util.find_spec(step[0]) is None:
        return "no such module here"
    try:
        code = subprocess.run([sys.executable, "-m", *step], timeout=SECONDS_EACH).returncode
    except subprocess.TimeoutExpired:
        return f"stopped, since it takes more than {SECONDS_EACH} s"
    return f"exit code {code}" if code else ""


if __name__ == "__main__":
    sys.exit(main())
