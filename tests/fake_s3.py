"""A stand-in for S3: the part of its API that s3fs uses to list and read one bucket, in memory."""

import contextlib
import hashlib
import http.server
import os
import re
import threading
import urllib.parse
from unittest import mock
from xml.sax.saxutils import escape

import fsspec

from tests.fake_server import Handler


class FakeS3(http.server.ThreadingHTTPServer):
    """One bucket, `bucket`; `objects` maps names to bytes. `reads` holds the size of every content that was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.objects, self.reads = {}, []

    def handle_error(self, *_):
        pass  # a client that hangs up has what it wants

    @property
    def environment(self):
        keys = {'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret', 'AWS_DEFAULT_REGION': 'us-east-1'}
        return {'AWS_ENDPOINT_URL': f'http://127.0.0.1:{self.server_port}', **keys}


@contextlib.contextmanager
def serve():
    """A server that answers while the context lasts, to which this process and those it starts are sent."""
    with FakeS3() as server, mock.patch.dict(os.environ, server.environment):
        clear = fsspec.get_filesystem_class('s3').clear_instance_cache  # a client asks once where its server is
        clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        clear()


class _Handler(Handler):
    def do_HEAD(self):
        self.answer(*self._find())

    def do_GET(self):
        self.answer(*self._find())

    def _find(self):
        place = urllib.parse.urlsplit(self.path)
        bucket, _, name = urllib.parse.unquote(place.path).lstrip('/').partition('/')
        query = dict(urllib.parse.parse_qsl(place.query))
        if bucket != 'bucket':
            return self._error(404, 'NoSuchBucket')
        if not name:
            return 200, self._list(query).encode() if 'list-type' in query else b''
        if name not in self.server.objects:
            return self._error(404, 'NoSuchKey')
        data = self.server.objects[name]
        if self.headers.get('If-Match', _tag(data)) != _tag(data):
            return self._error(412, 'PreconditionFailed')
        headers = {'ETag': _tag(data), 'Last-Modified': 'Thu, 01 Jan 2026 00:00:00 GMT'}
        status, size = 200, len(data)
        if part := self.headers.get('Range'):
            first, last = map(int, re.fullmatch(r'bytes=(\d+)-(\d+)', part).groups())
            status, data = 206, data[first : last + 1]
            headers['Content-Range'] = f'bytes {first}-{first + len(data) - 1}/{size}'
        if self.command == 'GET':
            self.server.reads.append(len(data))
        return status, data, headers

    def _error(self, status, code):
        return status, f'<Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()

    def _list(self, query):
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
        items, folders = [], set()
        for name, data in sorted(self.server.objects.items()):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append((name, data))
        contents = ''.join(
            f'<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>'
            f'<ETag>{escape(_tag(data))}</ETag><Size>{len(data)}</Size></Contents>'
            for name, data in items
        )
        prefixes = ''.join(
            f'<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>' for name in sorted(folders)
        )
        count = f'<KeyCount>{len(items) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>'
        return f'<ListBucketResult><Name>bucket</Name>{count}{contents}{prefixes}</ListBucketResult>'


def _tag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'
