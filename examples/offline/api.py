#!/usr/bin/env python3
"""A stand-in for an API server at 127.0.0.1:6443: lists the objects of a file, of which none ever changes."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

KINDS = {"services": "Service", "endpointslices": "EndpointSlice", "nodes": "Node"}
ITEMS = json.loads(Path(sys.argv[1]).read_text())["items"]


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, asked = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if "sendInitialEvents" in asked:
            self.say(422, {"kind": "Status", "code": 422, "message": "lists are not streamed here"})
        elif "watch" in asked:
            self.say(200, None)
            threading.Event().wait()
        else:
            kind = KINDS.get(path.rpartition("/")[2])
            items = [item for item in ITEMS if item["kind"] == kind]
            for item in items:
                item["metadata"]["resourceVersion"] = "1"
            self.say(200, {"kind": f"{kind}List", "metadata": {"resourceVersion": "1"}, "items": items})

    def say(self, status: int, body: object) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if body is not None:
            self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


ThreadingHTTPServer(("127.0.0.1", 6443), Answer).serve_forever()
