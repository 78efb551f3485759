"""A stand-in for the Hugging Face hub: a folder served as one data set, and what was asked of it."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "a" * 40


@contextmanager
def served(folder: Path, name: str):
    """The hub's address, and a list that grows: (file, bytes) for each data file, or piece of a file, that was sent."""
    sent: list[tuple[str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(self.path.split("?")[0])
            if re.fullmatch(f"/api/datasets/{name}(/revision/.*)?", path):
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": [], "tags": []}).encode())
            elif listed := re.fullmatch(f"/api/datasets/{name}/tree/{COMMIT}(.*)", path):
                entries = [
                    {
                        "type": "file" if entry.is_file() else "directory",
                        "path": str(entry.relative_to(folder)),
                        **{"size": entry.stat().st_size, "oid": "b" * 40},
                    }
                    for entry in sorted((folder / listed[1].strip("/")).iterdir())
                ]
                self.answer(json.dumps(entries).encode())
            elif (found := re.fullmatch(f"/datasets/{name}/resolve/[^/]+/(.*)", path)) and (
                folder / found[1]
            ).is_file():
                self.send_file(found[1])
            else:
                self.answer(b"", status=404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def send_file(self, file):
            data = (folder / file).read_bytes()
            headers = {"ETag": f'"{len(data)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None:
                if self.command == "GET" and file.endswith(".parquet"):
                    sent.append((file, len(data)))
                self.answer(data, **headers)
            else:
                start, end = int(asked[1]), min(int(asked[2]), len(data) - 1)
                sent.append((file, end - start + 1))
                part = f"bytes {start}-{end}/{len(data)}"
                self.answer(data[start : end + 1], status=206, Content_Range=part, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
