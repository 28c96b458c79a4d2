"""For tests of W&B without an account: reads offline runs back, and stands in for the server on loopback."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Logged rows of the only run under run_dir/wandb, without wandb's own keys (they start with _)."""
    (file,) = run_dir.glob("wandb/*run-*/run-*.wandb")
    rows = []
    for record in _records(file.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def _records(data: bytes) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    position, parts = 7, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 and size == 0:
            position += left
            continue
        chunk = data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        parts = chunk if kind in (1, 2) else parts + chunk  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


class StandInServer:
    """Answers just enough for a run to start and stream; keeps the bodies of what was streamed."""

    def __init__(self) -> None:
        self.streamed: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def _reply(self, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self._reply({})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._reply({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if not self.path.startswith("/graphql"):
                    outer.streamed.append(body.decode(errors="replace"))
                    return self._reply({"exitcode": None, "limits": {}})
                request = json.loads(body)
                host = self.headers["Host"]
                self._reply({"data": _answer(request["query"], request.get("variables") or {}, host)})

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None: ...  # dropped connections

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """From now on the port refuses connections."""
        self._server.shutdown()
        self._server.server_close()


def _answer(query: str, variables: dict[str, Any], host: str) -> dict[str, Any]:
    if "upsertBucket" in query:
        name = variables.get("name") or "x"
        entity = {"id": "ZW50", "name": "me"}
        bucket = {"id": "Qk" + name, "name": name, "displayName": name, "description": "", "sweepName": None}
        bucket |= {
            "config": "{}",
            "historyLineCount": 0,
            "project": {"id": "cA==", "name": "p", "entity": entity},
        }
        return {"upsertBucket": {"inserted": True, "bucket": bucket}}
    if "viewer" in query:
        versions = {"max_cli_version": "9.9.9", "min_cli_version": "0.0.1"}
        viewer = {"id": "dQ==", "entity": "me", "username": "me", "flags": "{}", "admin": False}
        info = {"cliVersionInfo": versions, "latestLocalVersionInfo": None, "features": []}
        return {"viewer": viewer | {"teams": {"edges": []}}, "serverInfo": info}
    if "serverFeatures" in query or "ServerFeatures" in query:
        return {"serverInfo": {"features": []}}
    if "createRunFiles" in query:
        files = [{"name": f, "uploadUrl": f"http://{host}/up/{f}"} for f in variables.get("files", [])]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    return {}
