"""A chat endpoint on this machine that plays a script: what the judge tests talk to, over real
HTTP."""

import json, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, model='made-up-judge'):
    return json.dumps(
        dict(model=model, choices=[dict(message=dict(role='assistant', content=text))])
    ).encode()


class Step:
    """One answer of the server: HTTP `status`, `body`, headers, seconds of silence before it, bytes
    sent one by one."""

    def __init__(self, body=b'', status=200, headers=None, silence=0.0, trickle=0.0):
        self.body, self.status, self.headers = body, status, headers or {}
        self.silence, self.trickle = silence, trickle


@contextmanager
def scripted(play):
    """Serves POST /v1/chat/completions; `play(n, request, headers)` returns a `Step` or the text of
    a completion. Yields the base URL and the list of requests."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            data = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with lock:
                seen.append(dict(data, path=self.path, headers=dict(self.headers)))
                step = play(len(seen) - 1, data, self.headers)
            step = step if isinstance(step, Step) else Step(completion(step))
            time.sleep(step.silence)
            try:
                self.send_response(step.status)
                for k, v in step.headers.items():
                    self.send_header(k, v)
                self.end_headers()
                if not step.trickle:
                    self.wfile.write(step.body)
                else:
                    for b in step.body:
                        self.wfile.write(bytes([b]))
                        self.wfile.flush()
                        time.sleep(step.trickle)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up

        def log_message(self, *args):
            return None

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/v1', seen
    finally:
        server.shutdown()
        server.server_close()
