"""A small file of weights of every version. `python -m tests.weights_format` writes that of this version."""

import json
import pathlib

import vqvae2_jax as vq2
from tests.test_sampling_program import make_generator
from vqvae2_jax.io import files

DIRECTORY = pathlib.Path(__file__).parent / 'data' / 'formats'


def main():
    DIRECTORY.mkdir(exist_ok=True)
    path, index = DIRECTORY / f'{vq2.__version__}.safetensors', DIRECTORY / 'digests.json'
    vq2.save(make_generator(), path)
    recorded = json.loads(index.read_text()) if index.exists() else {}
    recorded[path.name] = files.digest_arrays(vq2.load(path))
    index.write_text(json.dumps(dict(sorted(recorded.items())), indent=2) + '\n')


if __name__ == '__main__':
    main()
