"""A stand-in for the Hugging Face Hub: the part of its API by which a repository is listed and read, in memory."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from unittest import mock

import fsspec

from tests.fake_server import Handler

_API = re.compile(
    r'/api/(?:datasets|models)/(?P<id>[^/]+/[^/]+)(?:/(?P<kind>revision|tree|paths-info)/(?P<rev>[^/]+))?/?(?P<path>.*)'
)
_FILE = re.compile(r'(?:/datasets)?/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)')


class FakeHub(http.server.ThreadingHTTPServer):
    """One repository, the dataset `owner/images` or the model `owner/clothes`.

    `commits` maps commits to {path: bytes}; the last one is 'main'.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.commits, self.reads, self.requests = {}, [], []

    def handle_error(self, *_):
        pass  # a client that hangs up has what it wants

    def commit(self, files):
        """Adds a commit; returns its name."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        return name

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'


@contextlib.contextmanager
def serve(home):
    """A server that answers while the context lasts.

    Addresses hf:// of this process, and all that processes do that start in the context, are sent there. `home` is the
    folder of their downloads.
    """
    with FakeHub() as server:
        environment = {'HF_ENDPOINT': server.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1'}
        config = {'hf': {'endpoint': server.url}}
        with mock.patch.dict(os.environ, environment), mock.patch.dict(fsspec.config.conf, config):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server
            server.shutdown()


class _Handler(Handler):
    def do_GET(self):
        self.answer(*self._find({}))

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        fields = json.loads(body) if body.startswith(b'{') else urllib.parse.parse_qs(body.decode())
        self.answer(*self._find(fields))

    def answer(self, status, body=b'', headers=None):
        self.server.requests.append(f'{self.command} {self.path} {self.headers.get("Range", "")} {status}')
        super().answer(status, body, headers)

    def _find(self, fields):
        place = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        found = _API.fullmatch(place) or _FILE.fullmatch(place)
        if not found or found['id'] not in ('owner/images', 'owner/clothes'):
            return 404, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'}
        commit = found['rev'] or 'main'
        commit = list(self.server.commits)[-1] if commit == 'main' else commit
        if commit not in self.server.commits:
            return 404, {'error': 'Invalid rev id'}, {'X-Error-Code': 'RevisionNotFound'}
        files = self.server.commits[commit]
        if not place.startswith('/api/'):
            return self._content(files, commit, found['path'])
        if found['kind'] == 'tree':
            return self._tree(files, found['path'], query)
        if found['kind'] == 'paths-info':
            entries = {entry['path']: entry for entry in _entries(files)}
            return 200, [entries[path] for path in fields['paths'] if path in entries]
        siblings = [{'rfilename': path} for path in sorted(files)]
        return 200, {
            'id': found['id'],
            'sha': commit,
            'siblings': siblings,
            'private': False,
            'tags': [],
            'gated': False,
        }

    def _tree(self, files, folder, query):
        prefix = f'{folder}/' if folder else ''
        entries = [entry for entry in _entries(files) if entry['path'].startswith(prefix)]
        if query.get('recursive', 'False').lower() != 'true':
            entries = [entry for entry in entries if '/' not in entry['path'].removeprefix(prefix)]
        if not entries:
            return 404, {'error': 'no such entry'}, {'X-Error-Code': 'EntryNotFound'}
        return 200, entries

    def _content(self, files, commit, path):
        if path not in files:
            return 404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit}
        data = files[path]
        headers = {'ETag': f'"{_blob(data)}"', 'X-Repo-Commit': commit, 'Accept-Ranges': 'bytes'}
        status, size = 200, len(data)
        if part := self.headers.get('Range'):
            first, last = re.fullmatch(r'bytes=(\d+)-(\d*)', part).groups()
            data = data[int(first) : int(last) + 1 if last else None]
            status, headers['Content-Range'] = 206, f'bytes {first}-{int(first) + len(data) - 1}/{size}'
        if self.command == 'GET':
            self.server.reads.append(len(data))
        return status, data, headers


def _entries(files):
    folders = {path.rsplit('/', n)[0] for path in files for n in range(1, path.count('/') + 1)}
    found = [{'type': 'directory', 'path': path, 'oid': '0' * 40, 'size': 0} for path in sorted(folders)]
    return found + [
        {'type': 'file', 'path': path, 'oid': _blob(data), 'size': len(data)} for path, data in sorted(files.items())
    ]


def _blob(data):
    return hashlib.sha1(data).hexdigest()
