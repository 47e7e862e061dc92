"""Kernels of GPU programs: counts and modeled times of small ones, from saved texts and from the installed compiler."""

import pytest

from tests import gpu_programs
from vqvae2_jax.planning import gpu_kernels, hardware, hlo
from vqvae2_jax.planning.products import PALLAS_FLOPS, UnknownCall

H100 = hardware._GPUS['h100']
N = gpu_programs.N
PRODUCT = 2 * N**3  # FLOPs of a product of two [N, N]
CONVOLUTION = 2 * (8 * 32 * 32 * 128) * (3 * 3 * 64)
SCORES = 4 * 8 * N * N  # of attention: batch, heads, positions
# XLA splits products of [N, N] in four along the depth and sums the parts in float32: 4 N^2 written and read again.
PARTS, IMAGE, MAP, KERNEL = 4 * 4 * N * N, 8 * 32 * 32 * 64, 8 * 32 * 32 * 128, 3 * 3 * 64 * 128
QUERY = 2 * 4 * N * 8 * 64  # bytes of queries, keys, values or outputs
LOOKUP = 4 * (2 * 128 * 64 + 2 * 128 + 1024) + 2 * 2 * 3 * 128 * 64  # bytes, without those of the vectors
EXPECTED = {  # name: number of kernels, bytes, {precision: FLOPs}
    'dot_highest': (2, 4 * 3 * N**2 + 2 * PARTS, {'float32': PRODUCT}),
    'dot_default': (2, 4 * 3 * N**2 + 2 * PARTS, {'tf32': PRODUCT}),
    'dot_bfloat16': (2, 2 * 3 * N**2 + 2 * PARTS, {'bfloat16': PRODUCT}),
    'cublas_highest': (1, 4 * 3 * N**2, {'float32': PRODUCT}),  # not its workspace
    'cublas_batch': (1, 2 * 16 * (2 * 64 * N + N**2), {'bfloat16': 2 * 16 * 64 * N**2}),
    'conv_highest': (2, 4 * (IMAGE + MAP + 3 * KERNEL), {'float32': CONVOLUTION}),  # the kernel is transposed first
    # three convolutions, two transposed kernels, and the gradient 2 y of the squares
    'conv_gradient': (6, 2 * (3 * (IMAGE + MAP + KERNEL) + 4 * KERNEL + 2 * MAP), {'bfloat16': 3 * CONVOLUTION}),
    # q k v -> out and its statistics; 2 out; q k v, statistics, out and its gradient -> three gradients; four masks
    'attention': (4, (4 + 2 + 8) * QUERY + 2 * 4 * 4 * 8 * N + (1 + 4 * 2) * N**2, {'bfloat16': 7 * 2 * SCORES * 64}),
    # norms of the codebook; its three parts; the lookup, which multiplies six pairs of parts, or three
    'nearest_float32': (3, LOOKUP + 4 * 1024 * 64, {'bfloat16': 6 * 2 * 1024 * 128 * 64}),
    'nearest_bfloat16': (3, LOOKUP + 2 * 1024 * 64, {'bfloat16': 3 * 2 * 1024 * 128 * 64}),
    # two copies first; an iteration counts its steps (8 bytes)
    'known_bound': (2 + 7 * 3, 8 + 4 * N**2 + 7 * (8 + 2 * 3 * N**2 + 2 * PARTS), {'bfloat16': 7 * PRODUCT}),
    'branches': (5, 8 + 2 * (2 * 3 * N**2 + 2 * PARTS), {'bfloat16': 2 * PRODUCT}),  # a @ a @ a
    # copies and an arange first; an iteration reads two rows and x, writes x, then copies x into a row
    'ring': (4 + 7 * 3, 8 + 8 * (9 + 1) * 64 * N + 28 + 7 * (4 * 6 * 64 * N + 24), {}),
    'columns': (1, 4 * 2 * 1024 * 64, {}),  # of an array [1024, 1024]
    'rows_of_a_table': (1, 4 * (512 * 64 + 100_000 * (64 + 1)), {}),  # the table once
}


def saved(name):
    return hlo.parse((gpu_programs.DIRECTORY / f'{name}.txt').read_text())


def flops(found):
    sums = {}
    for kernel in found:
        for precision, count in kernel.flops.items():
            sums[precision] = sums.get(precision, 0) + kernel.times * count
    return sums


@pytest.mark.parametrize('name', EXPECTED)
def test_counts_of_small_programs(name):
    count, moved, products = EXPECTED[name]
    found = gpu_kernels.execution(saved(name), H100).kernels
    total = gpu_kernels.total(found, H100)
    assert flops(found) == products
    assert (total.kernels, total.bytes, total.flops) == (count, moved, sum(products.values()))


@pytest.mark.system
@pytest.mark.skipif(not hardware.has_gpu_compiler(), reason="JAX's CUDA plugin is not installed")
@pytest.mark.parametrize('name', EXPECTED)
def test_the_installed_compiler_gives_the_same_flops(name):
    text = gpu_programs.compile_text(name)
    for version in (text, gpu_programs.shorten(text)):
        assert flops(gpu_kernels.execution(hlo.parse(version), H100).kernels) == EXPECTED[name][2]


@pytest.mark.parametrize('name, peak', [('dot_highest', 67e12), ('dot_default', 494e12), ('dot_bfloat16', 989e12)])
def test_products_are_timed_at_the_peak_of_their_precision(name, peak):
    product, addition = gpu_kernels.execution(saved(name), H100).kernels
    assert product.compute_seconds(H100) == pytest.approx(PRODUCT / peak)
    assert product.seconds(H100) == max(PRODUCT / peak, product.bytes / 3352.32e9) + 1.5e-6
    total = gpu_kernels.total([product, addition], H100)
    assert total.seconds == pytest.approx(product.seconds(H100) + addition.seconds(H100))
    assert total.compute_seconds == product.compute_seconds(H100) and total.launch_seconds == 3e-6
    assert total.memory_seconds == pytest.approx((product.bytes + addition.bytes) / 3352.32e9)


def test_a_loop_with_an_unknown_count_needs_its_mean():
    with pytest.raises(gpu_kernels.UnknownTripCount, match=r'while.* give their mean as trips'):
        gpu_kernels.execution(saved('traced_bound'), H100)
    found = gpu_kernels.execution(saved('traced_bound'), H100, trips=2.5)
    assert flops(found.kernels) == {'bfloat16': 2.5 * PRODUCT}
    (loop,) = found.loops  # the product in two kernels, the counter, and the condition, which runs on the GPU
    assert (loop.iterations, loop.iteration.kernels, loop.launches) == (2.5, 4, 10)
    known = gpu_kernels.execution(saved('known_bound'), H100, trips=2.5)
    assert flops(known.kernels) == {'bfloat16': 7 * PRODUCT}


@pytest.mark.parametrize('name, called', [('twice', 'the Pallas kernel twice'), ('cholesky', 'cusolver_potrf')])
def test_an_unknown_call_is_an_error(name, called):
    with pytest.raises(UnknownCall, match=f'calls {called}'):
        gpu_kernels.execution(saved(name), H100)


def test_flops_of_another_pallas_kernel_are_registered_by_name(monkeypatch):
    monkeypatch.setitem(PALLAS_FLOPS, 'twice', lambda operands: {'float32': operands[0][1][0] * 64})
    assert flops(gpu_kernels.execution(saved('twice'), H100).kernels) == {'float32': 512 * 64}


NESTED = """
%body.1 (x: s32[]) -> s32[] {
  %a = bf16[64,8]{1,0} copy(%x)
  ROOT %w = s32[] while(%a), condition=%never, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
}

%body.2 (x: s32[]) -> s32[] {
  %b = bf16[64,8]{1,0} copy(%a)
  ROOT %c = bf16[64,8]{1,0} copy(%b)
}

ENTRY %main (x: s32[]) -> s32[] {
  ROOT %v = s32[] while(%x), condition=%never, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_loops_report_one_iteration():
    found = gpu_kernels.execution(hlo.parse(NESTED), H100)
    outer, inner = found.loops
    assert (outer.iterations, outer.iteration.kernels, outer.launches) == (3, 1 + 5 * 2, 3)
    assert (inner.iterations, inner.iteration.kernels, inner.launches) == (15, 2, 30)
    assert gpu_kernels.busiest_loop(found.loops) == inner and gpu_kernels.busiest_loop([]) is None
    assert gpu_kernels.by_kind(found.kernels, H100)['copy'].kernels == 3 + 30


def test_asynchronous_operations_count_once():
    text = """
%wrapped (x: f32[2,8]) -> f32[8] {
  %y = f32[2,8]{1,0} parameter(0)
  ROOT %s = f32[8]{0} reduce-scatter(%y), channel_id=3
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %g = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), channel_id=1
  %h = f32[8,8]{1,0} all-gather-done(%g)
  %r = f32[8,8]{1,0} all-reduce-start(%h), channel_id=2
  %q = f32[8,8]{1,0} all-reduce-done(%r)
  %t = ((f32[2,8]{1,0}), f32[8]{0}) async-start(%x), calls=%wrapped
  ROOT %u = f32[8]{0} async-done(%t)
}
"""
    found = gpu_kernels.execution(hlo.parse(text), H100).kernels
    assert [kernel.kind for kernel in found] == ['all-gather-start', 'all-reduce-start', 'reduce-scatter']
    assert [kernel.bytes for kernel in found] == [4 * (16 + 64), 4 * (64 + 64), 4 * (16 + 8)]


@pytest.mark.parametrize(
    'root, moved',
    [
        ('dynamic-update-slice(%first, %u, %i)', 2 * 8 + 8 + 4),  # two rows in place, one update read, the index
        ('bitcast(%first)', 8 + 8 + 4),
        ('add(%first, %p)', 80 + 80 + 8 + 4),  # not in place: the whole array
    ],
)
def test_updates_in_place_count_the_rows(root, moved):
    text = f"""
%fused (p: bf16[10,4], u: bf16[1,4], i: s32[]) -> bf16[10,4] {{
  %p = bf16[10,4]{{1,0}} parameter(0)
  %u = bf16[1,4]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %first = bf16[10,4]{{1,0}} dynamic-update-slice(%p, %u, %i)
  ROOT %second = bf16[10,4]{{1,0}} {root}
}}

ENTRY %main (p: bf16[10,4]) -> bf16[10,4] {{
  ROOT %f = bf16[10,4]{{1,0}} fusion(%p, %u, %i), kind=kLoop, calls=%fused
}}
"""
    (kernel,) = gpu_kernels.execution(hlo.parse(text), H100).kernels
    assert kernel.bytes == moved


def test_shapes_of_tpu_programs_are_parsed():
    line = '  ROOT %s = ((f32[8,4]{1,0:T(8,128)(2,1)}), u32[]{:S(2)}) copy-start(%x, /*index=1*/%y), calls=%f'
    module = hlo.parse('ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n' + line + '\n}')
    operation = module.computations['main']['s']
    assert operation.shape == '((f32[8,4]{1,0:T(8,128)(2,1)}), u32[]{:S(2)})' and operation.opcode == 'copy-start'
    assert operation.operands == ['x', 'y'] and operation.called == ['f'] and operation.is_root


@pytest.mark.system
@pytest.mark.skipif(not hardware.has_gpu_compiler(), reason="JAX's CUDA plugin is not installed")
def test_gpus_that_are_not_attached_have_hosts_of_at_most_eight():
    for name, hosts in (('a100:8', 1), ('h200:16', 2), ('b200:12', 2)):
        devices = hardware.topology_devices(name)
        assert hardware.hardware_of(devices[0]).name == name.partition(':')[0].upper()
        assert len(devices) == int(name.partition(':')[2])
        assert len({device.process_index for device in devices}) == hosts
        assert not hardware.is_simulated(devices[0])
