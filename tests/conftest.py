"""What holds for every test: eight virtual CPU devices, so that sharding is real, and no display."""

import os

# Before anything imports JAX: the backend reads these once.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['MPLBACKEND'] = 'Agg'
