"""Measures times for the benchmarks, and describes the machine."""

import os
import re
import time

import jax
import jax.numpy as jnp


def seconds(function, *arguments):
    """Measures the seconds of a call of the compiled function: the best of five, or of fewer if they take over 5 s."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = []
    while not times or (len(times) < 5 and sum(times) < 5):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_bandwidth():
    """Measures the bytes per second of reading memory: the sum of 512 MiB."""
    x = jnp.ones((2**27,), jnp.float32)
    return x.nbytes / seconds(jnp.sum, x)


def measure_products(dtype=jnp.float32):
    """Measures the FLOP/s of a large matrix product."""
    x = jnp.ones((4096, 4096), dtype)
    return 2 * len(x) ** 3 / seconds(jnp.matmul, x, x)


def machine():
    """Returns the machine that times were measured on, as text."""
    name = jax.devices()[0].device_kind
    if name != 'cpu':
        return f'{jax.device_count()} x {name}'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next(iter(re.findall(r'^model name\s*: (.*)', file.read(), re.MULTILINE)), name)
    return f'{len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()} cores of {name}'
