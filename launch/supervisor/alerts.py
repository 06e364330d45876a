"""Tell somebody: a command of the user's, or a mail."""

from __future__ import annotations

import os
import shutil
import subprocess

from launch.supervisor.job import Job

SECONDS = 30.0


def send(job: Job, kind: str, message: str) -> None:
    """Run the alert command and send the mail, if there are any; that one fails stops nothing.

    The command is run without a shell, with the run folder, the kind and the message as arguments.
    """
    text = f"{job.run_dir}: {kind}: {message}"
    if job.alert_command:
        _run([job.alert_command, job.run_dir, kind, message], "")
    if job.mail and shutil.which("mail"):
        _run(["mail", "-s", f"{os.path.basename(job.run_dir)}: {kind}", job.mail], text)


def _run(command: list[str], text: str) -> None:
    try:
        subprocess.run(command, input=text, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"supervisor: alert not sent: {error}", flush=True)
