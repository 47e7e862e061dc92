"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs and TensorStore use, in memory."""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import re
import threading
import time
import urllib.parse
from unittest import mock

from tests.fake_server import Handler
from vqvae2_jax.io import remote

_OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)(?:/(?:rewriteTo|copyTo|moveTo)/.*o/([^/]+))?')


class FakeGCS(http.server.ThreadingHTTPServer):
    """One bucket. `environment` sends its clients here; `objects` maps names to (bytes, generation).

    The next `lost_answers` changes are made, but answered as if the server had failed. `reads` holds the size of every
    content that was sent; each waits for `delay` seconds.
    """

    daemon_threads = True
    numbers = itertools.count(1)  # generations, of all servers: clients may keep a content by its generation

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.objects, self.uploads, self.lock = {}, {}, threading.RLock()
        self.lost_answers = 0
        self.reads, self.delay = [], 0.0

    def handle_error(self, *_):
        pass  # a client that hangs up has what it wants

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'

    @property
    def environment(self):
        none = {'GCE_METADATA_ROOT': '127.0.0.1:1'}  # of the machines whose metadata has credentials
        return {'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url} | none


@contextlib.contextmanager
def serve():
    """A server that answers while the context lasts, to which this process and those it starts are sent."""
    remote.configure()
    with FakeGCS() as server, mock.patch.dict(os.environ, server.environment):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(Handler):
    def do_GET(self):
        with self.server.lock:
            answer = self._get()
        if self._query.get('alt') == 'media':
            self.server.reads.append(len(answer[1]))
            time.sleep(self.server.delay)
        self.answer(*answer)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        with self.server.lock:
            self.answer(*self._post(body))

    do_PUT = do_POST

    def do_DELETE(self):
        with self.server.lock:
            self.answer(*self._delete(self._name()))

    @property
    def _query(self):
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))

    def _name(self, group=2):
        found = _OBJECT.fullmatch(urllib.parse.urlsplit(self.path).path)
        return urllib.parse.unquote(found[group]) if found and found[group] else None

    def answer(self, status, body=b'', headers=None):
        if self.server.lost_answers and self.command != 'GET':
            self.server.lost_answers -= 1
            status, body, headers = 503, b'', None
        super().answer(status, body, headers)

    def _resource(self, name):
        data, generation = self.server.objects[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        fixed = {'kind': 'storage#object', 'bucket': 'bucket', 'updated': '2026-01-01T00:00:00Z', 'md5Hash': md5}
        link = f'{self.server.url}/download/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe="")}?alt=media'
        return fixed | {'name': name, 'generation': str(generation), 'size': str(len(data)), 'mediaLink': link}

    def _wrong_generation(self, name):
        now = str(self.server.objects[name][1]) if name in self.server.objects else '0'
        if self._query.get('ifGenerationMatch', now) != now:
            return 412
        return 304 if self._query.get('ifGenerationNotMatch') == now else None

    def _get(self):
        name = self._name()
        if name is None:
            place = self.path.split('?')[0]
            if '/b/bucket' not in place:
                return 404, {'error': {'code': 404, 'message': 'no such bucket'}}
            return self._list() if place.endswith('/o') else (200, {'name': 'bucket'})
        if name not in self.server.objects:
            return 404, {'error': {'code': 404, 'message': f'no {name}'}}
        if status := self._wrong_generation(name):
            return status, b''
        if self._query.get('generation', now := str(self.server.objects[name][1])) != now:
            return 404, {'error': {'code': 404, 'message': f'no such generation of {name}'}}
        if self._query.get('alt') != 'media':
            return 200, self._resource(name)
        data, generation = self.server.objects[name]
        headers, part = {'x-goog-generation': str(generation)}, self.headers.get('Range')
        if not part:
            return 200, data, headers
        start, stop = re.fullmatch(r'bytes=(\d*)-(\d*)', part).groups()
        first = int(start) if start else max(len(data) - int(stop), 0)
        last = min(int(stop), len(data) - 1) if start and stop else len(data) - 1
        if first >= len(data):
            return 416, b''
        return 206, data[first : last + 1], headers | {'Content-Range': f'bytes {first}-{last}/{len(data)}'}

    def _list(self):
        prefix, delimiter = self._query.get('prefix', ''), self._query.get('delimiter')
        items, folders = [], set()
        for name in sorted(n for n in self.server.objects if n.startswith(prefix)):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._resource(name))
        return 200, {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(folders)}

    def _post(self, body):
        query, place = self._query, urllib.parse.urlsplit(self.path).path
        if place.startswith('/batch'):
            return self._batch(body)
        if other := self._name(3):
            data = self.server.objects[self._name()][0]
            if '/moveTo/' in place:
                del self.server.objects[self._name()]
            resource = self._put(other, data)
            return 200, {'done': True, 'resource': resource} if '/rewriteTo/' in place else resource
        if upload := query.get('upload_id'):
            name, data = self.server.uploads[upload]
            self.server.uploads[upload] = name, data + body
            if status := self._wrong_generation(name):
                return status, b''
            if not self.headers.get('Content-Range', '/0').endswith('/*'):
                return 200, self._put(name, data + body)
            return 308, b'', {'Range': f'bytes=0-{len(data + body) - 1}'}
        if query['uploadType'] == 'multipart':
            boundary = re.search('boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
            meta, content = (part.split(b'\r\n\r\n' if b'\r\n\r\n' in part else b'\n\n', 1)[1]
                             for part in body.split(b'--' + boundary)[1:3])  # fmt: skip
            name = query.get('name') or json.loads(meta)['name']
            if status := self._wrong_generation(name):
                return status, b''
            return 200, self._put(name, content.removesuffix(b'\n'))
        name = query.get('name') or json.loads(body)['name']
        if status := self._wrong_generation(name):
            return status, b''
        if query['uploadType'] == 'media':
            return 200, self._put(name, body)
        upload = str(next(self.server.numbers))
        self.server.uploads[upload] = name, b''
        return 200, b'', {'Location': f'{self.server.url}{self.path}&upload_id={upload}'}

    def _put(self, name, data):
        self.server.objects[name] = data, next(self.server.numbers)
        return self._resource(name)

    def _delete(self, name):
        if name not in self.server.objects:
            return 404, {'error': {'code': 404, 'message': f'no {name}'}}
        if status := self._wrong_generation(name):
            return status, b''
        del self.server.objects[name]
        return 204, b''

    def _batch(self, body):
        names = re.findall(rb'DELETE [^ ]*/o/([^ ?]+)', body)
        parts = []
        for number, name in enumerate(names, start=1):
            self.server.objects.pop(urllib.parse.unquote(name.decode()), None)
            parts.append(f'--b\r\nContent-Type: application/http\r\nContent-ID: <response-x+{number}>\r\n\r\n'
                         'HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n\r\n')  # fmt: skip
        return 200, (''.join(parts) + '--b--').encode(), {'Content-Type': 'multipart/mixed; boundary=b'}
