"""A bucket of Google Cloud Storage on this machine, whose requests are counted."""

import contextlib
import http.server
import json
import ssl
import subprocess
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

HOSTS = ("storage.googleapis.com", "www.googleapis.com")


class Bucket(http.server.ThreadingHTTPServer):
    """Serves a folder as gs://bucket to TensorFlow, which reaches Google's hosts through it.

    Attributes:
      reads: (object, bytes) of each read of an object's contents.
      environment: variables to set before TensorFlow uses the bucket.
    """

    daemon_threads = True

    def __init__(self, folder, scratch):
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.folder, self.reads = Path(folder), []
        key, certificate = scratch / "key.pem", scratch / "certificate.pem"
        names = ",".join(f"DNS:{host}" for host in HOSTS)
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=bucket".split()
        command += ["-addext", f"subjectAltName={names}", "-keyout", key, "-out", certificate]
        subprocess.run(command, check=True, capture_output=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)
        self.environment = {
            "https_proxy": f"http://127.0.0.1:{self.server_port}",
            "CURL_CA_BUNDLE": str(certificate),
            "NO_GCE_CHECK": "true",
        }

    @contextlib.contextmanager
    def serving(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Answers Google's hosts itself: the tunnel that a client requests ends here."""

    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def finish(self):
        super().finish()
        self.connection.close()

    def do_GET(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] != "storage":
            return self._contents("/".join(parts[1:]))
        if parts[-1] == "o":
            return self._json(self._listing({k: v[0] for k, v in parse_qs(url.query).items()}))
        if len(parts) < 5:
            return self._json({"name": parts[-1], "location": "US"})
        return self._metadata(parts[-1])

    def _metadata(self, name):
        file = self.server.folder / name
        if not file.is_file():
            return self._send(404, b"{}")
        return self._json(self._described(name, file))

    def _described(self, name, file):
        size = str(file.stat().st_size)
        return {"name": name, "size": size, "generation": "1", "updated": "2020-01-01T00:00:00.0Z"}

    def _listing(self, query):
        prefix, items, below = query.get("prefix", ""), [], set()
        for file in sorted(self.server.folder.rglob("*")):
            name = file.relative_to(self.server.folder).as_posix()
            if not file.is_file() or not name.startswith(prefix):
                continue
            first, slash, _ = name[len(prefix) :].partition("/")
            if slash and "delimiter" in query:
                below.add(prefix + first + "/")
            else:
                items.append(self._described(name, file))
        return {"items": items, "prefixes": sorted(below)}

    def _contents(self, name):
        file = self.server.folder / name
        if not file.is_file():
            return self._send(404, b"{}")
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with file.open("rb") as handle:
            handle.seek(first)
            found = handle.read(last + 1 - first)
        if not found:
            return self._send(416, b"")
        self.server.reads.append((name, len(found)))
        self._send(206, found)

    def _json(self, value):
        self._send(200, json.dumps(value).encode())

    def _send(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_):
        pass
