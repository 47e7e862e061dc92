"""The command `vqvae2`, or `python -m vqvae2_jax`: the same as `python -m vqvae2_jax.main`."""

from vqvae2_jax.io import terminal


def run() -> None:
    """Runs the command line; the console script `vqvae2` starts here."""
    terminal.prepare()  # importing the command line takes seconds
    from vqvae2_jax import main

    main.run()


if __name__ == '__main__':
    run()
