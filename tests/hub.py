"""Stands for the Hugging Face Hub on this machine: takes what `huggingface_hub` sends when a folder is uploaded."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_local_stand_in"
LARGE = (".safetensors", ".png")  # files that go by LFS, in its basic transfer


class Hub(ThreadingHTTPServer):
    """A hub at `url` that keeps the newest content of every file.

    Attributes:
        files: repository -> path -> content, of all commits so far.
        commits: the messages of the commits, in order.
        failing: (a pattern of paths, a status): requests to such paths are answered by this status.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.commits, self.objects, self.failing = {}, [], {}, None


@contextlib.contextmanager
def running():
    """A hub that runs within this context."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_PUT(self):
        content = self._body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_POST(self):
        body, failing = self._body(), self.server.failing
        if failing is not None and re.search(failing[0], self.path):
            return self._answer(failing[1], {"error": "this hub fails"})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            self.server.files.setdefault(repo, {})
            return self._answer(200, {"url": f"{self.server.url}/{repo}", "id": repo})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(LARGE) else "regular"} for n in names]
            return self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            href = {"upload": {"href": f"{self.server.url}/upload", "header": {}}}
            objects = [{**one, "actions": href} for one in json.loads(body)["objects"]]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch("/api/models/(.+)/commit/main", self.path):
            return self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        return self._answer(200, {})  # such as the check of a card's metadata

    def _commit(self, repo, lines):
        files = self.server.files[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/0", "commitOid": "0", "success": True})

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status, body, headers=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
