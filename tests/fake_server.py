"""The handler of HTTP requests that the stand-ins for gs://, s3:// and hf:// share. It writes no log."""

import http.server
import json


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests; subclasses have the methods do_GET and so on."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # it waits 40 ms between the headers and the body

    def log_message(self, *_):
        pass

    def answer(self, status, body=b'', headers=None):
        """Sends an answer; a body that is not bytes is sent as JSON, and none to a HEAD request."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({'Content-Length': str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
