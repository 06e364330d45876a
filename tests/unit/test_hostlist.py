"""Host lists come out as Slurm's own command expands them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.hostlist import expand

WRITTEN = {
    "": [],
    "gpu-b": ["gpu-b"],
    "node[01-03,7],gpu-b": ["node01", "node02", "node03", "node7", "gpu-b"],
    "a[1-2]b[3-4]": ["a1b3", "a1b4", "a2b3", "a2b4"],
    "a[1-2][3-4]": ["a13", "a14", "a23", "a24"],
    "n[8-11]": ["n8", "n9", "n10", "n11"],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "n[001,2]": ["n001", "n2"],
    "n[99-101]": ["n99", "n100", "n101"],
    "n[099-101]": ["n099", "n100", "n101"],
    "b,a,b": ["b", "a", "b"],
    "[1-2]": ["1", "2"],
}
# Slurm's command expands no name that goes on behind its last bracket; its node lists can have one.
SUFFIXED = {
    "n[1-2]-ib": ["n1-ib", "n2-ib"],
    "r[0-1]n[05,7]x": ["r0n05x", "r0n7x", "r1n05x", "r1n7x"],
}


@pytest.mark.parametrize("text", [*WRITTEN, *SUFFIXED])
def test_written_cases(text: str) -> None:
    assert expand(text) == (WRITTEN | SUFFIXED)[text]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm's scontrol is not installed")
@pytest.mark.parametrize("text", [text for text in WRITTEN if text])
def test_scontrol_says_the_same(text: str, tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    said = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        capture_output=True, text=True, check=True, timeout=30,
        env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
    )  # fmt: skip
    assert expand(text) == said.stdout.split()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("n[1", "brackets do not match"),
        ("n1]", "brackets do not match"),
        ("n[[1-2]]", "brackets do not match"),
        ("n[]", "not a number"),
        ("n[a-b]", "not a number"),
        ("n[1-2-3]", "not a number"),
        ("n[1,,2]", "not a number"),
        ("n[-1]", "not a number"),
        ("n[3-1]", "runs backwards"),
    ],
)
def test_what_is_no_host_list(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        expand(text)
