"""Stand-in for the server of an Inference Endpoint (huggingface-inference-toolkit), on the loopback address.

As in the toolkit, an image body reaches the handler as an RGB PIL image and JSON unchanged, and an exception is
answered with status 400 and its text. Other bodies reach the handler as bytes. GET answers the peak memory of the
process in MiB.

    python endpoint_server.py FOLDER    # serves FOLDER/handler.py without the package, prints its URL
"""

import importlib.util
import io
import json
import resource
import sys
from http.server import BaseHTTPRequestHandler

from loopback_server import LoopbackServer
from PIL import Image


def load_handler(folder, model=None):
    """The handler in `folder`, with the model of that folder or of another one."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(model or folder))


class EndpointServer(LoopbackServer):
    def __init__(self, handler):
        super().__init__(Request)
        self.handler = handler


class Request(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.headers.get("Content-Type", "")
        try:
            if kind == "application/json":
                data = json.loads(body)
            elif kind.startswith("image/"):
                data = {"inputs": Image.open(io.BytesIO(body)).convert("RGB")}
            else:
                data = {"inputs": body}
            status, answer = 200, self.server.handler(data)
        except Exception as error:
            status, answer = 400, {"error": str(error)}
        self.answer(status, answer)

    def do_GET(self):
        self.answer(200, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    def answer(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    from pathlib import Path

    sys.modules["probabilistic_sam"] = None  # importing it fails
    server = EndpointServer(load_handler(Path(sys.argv[1])))
    print(server.url, flush=True)
    server.serve_forever()
