"""A stand-in for W&B's server on 127.0.0.1, for the real client: runs, resuming, failures.

What the requests are was seen by watching wandb 0.31 talk; what the server does with them follows
the client's source (``core/internal/runbranch/resume.go`` and ``core/internal/filestream`` in
wandb/wandb). History is a file of lines: each request says at which line its own begin, so one
that is sent twice, because its answer was lost, changes nothing.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
KEY = "k" * 40

# What to do with a request instead of answering it: None = answer it; a status; "drop" = close the
# connection; "lose" = do what it asks and close the connection; "hang" = that once released.
Fault = int | str | None


@dataclass
class StoredRun:
    """A run as W&B has it."""

    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """History rows by line number."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    """Of every session that ended in an orderly way."""
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows in order; a line never written is a fault of the client."""
        assert sorted(self.lines) == list(range(len(self.lines))), "a hole in the history"
        return [self.lines[number] for number in range(len(self.lines))]

    def values(self, name: str) -> list[tuple[int, Any]]:
        """The curve of a metric: its values and their optimizer steps, in the order of upload."""
        return [(row["step"], row[name]) for row in self.history if name in row]

    def user_config(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in self.config.items() if name != "_wandb"}


class WandbServer:
    """Starts answering at once, on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.paths: list[str] = []
        """Of all requests but telemetry, the refused ones too."""
        self.uploads: dict[str, bytes] = {}
        """Files of runs by name."""
        self.fault: Callable[[str], Fault] = lambda path: None
        """Decides by a request's path, ``/graphql`` or ``/files/.../file_stream``."""
        self.released = threading.Event()
        self.lock = threading.Lock()
        self._http = _QuietServer(("127.0.0.1", 0), _Handler)
        self._http.standin = self  # type: ignore[attr-defined]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def run(self) -> StoredRun:
        """The only run there is."""
        (run,) = self.runs.values()
        return run

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def fail_next(self, *faults: Fault, path: str = "file_stream") -> None:
        """Meet the next requests whose path ends so with these faults, then work again."""
        waiting = list(faults)
        self.fault = lambda found: waiting.pop(0) if waiting and found.endswith(path) else None

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables.get("name") or "")
        name = variables.get("project") or "p"
        project = {
            "id": "p",
            "name": name,
            "internalId": "1",
            "entity": {"id": "e", "name": ENTITY},
        }
        match operation:
            case "Viewer" | "GetViewer" | "GetDefaultEntity":
                return {"viewer": {"id": "u", "entity": ENTITY, "username": "u", "flags": "{}",
                                   "email": "", "teams": {"edges": []}}}  # fmt: skip
            case "RunResumeStatus":
                return {"model": {**project, "bucket": run and _resume_status(variables, run)}}
            case "UpsertBucket":
                inserted = run is None
                run = self.runs.setdefault(variables["name"], StoredRun())
                if variables.get("config"):
                    run.config = json.loads(variables["config"])
                bucket = {**_described(variables["name"], run), "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
                    for name in variables["files"]
                ]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case _:
                described = run and _described(variables["name"], run)
                return {"project": {**project, "run": described}}

    def file_stream(self, run: StoredRun, request: dict[str, Any]) -> None:
        for name, chunk in request.get("files", {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                run.lines.update(enumerate(rows, start=chunk["offset"]))
            elif name == "wandb-summary.json":
                run.summary = rows[-1]
        run.preempting |= bool(request.get("preempting"))
        if request.get("complete"):
            run.exit_codes.append(request["exitcode"])


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()


def _described(name: str, run: StoredRun) -> dict[str, Any]:
    last = run.history[-1] if run.lines else {}
    return {
        "id": name,
        "name": name,
        "displayName": name,
        "state": "finished" if run.exit_codes else "running",
        "tags": [],
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.lines),
        "historyKeys": {"lastStep": last.get("_step", -1), "keys": {}},
        "projectId": "1",
    }


def _resume_status(variables: dict[str, Any], run: StoredRun) -> dict[str, Any]:
    tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
    return {
        **_described(variables["name"], run),
        "logLineCount": 0,
        "eventsLineCount": 0,
        "historyTail": tail,
        "eventsTail": "[]",
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),
    }


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client was killed, or has hung up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        standin: WandbServer = self.server.standin  # type: ignore[attr-defined]
        if self.path.startswith("/sdk/"):  # telemetry
            return self._answer(200, {})
        standin.paths.append(self.path)
        fault = standin.fault(self.path)
        if fault == "hang":
            standin.released.wait()
        if isinstance(fault, int):
            return self._answer(fault, {"error": "as the test asked"})
        if fault == "drop":
            self.close_connection = True
            return None
        with standin.lock:
            answer = self._act(standin, body)
        if fault == "lose":
            self.close_connection = True
            return None
        return self._answer(200, answer)

    do_PUT = do_POST
    do_GET = do_POST

    def _act(self, standin: WandbServer, body: bytes) -> dict[str, Any]:
        if self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = operation.group(1) if operation else ""
            return {"data": standin.graphql(name, request.get("variables") or {})}
        if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            standin.file_stream(standin.runs[found.group(1)], json.loads(body))
        elif self.path.startswith("/upload/"):
            standin.uploads[self.path.removeprefix("/upload/")] = body
        return {}

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...
