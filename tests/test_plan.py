"""Plans: FLOPs against arithmetic and XLA, communication independent of the device count, errors, a TPU compiler."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from vqvae2_jax.distributed import processes
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import plan
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.planning import hardware, programs, table
from vqvae2_jax.planning.cost import Cost, count
from vqvae2_jax.planning.hlo import collective_bytes, parse


def test_products_convolutions_and_loops_are_counted():
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert count(jnp.dot, a, b) == Cost(2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    looped = count(lambda a, b: jax.lax.scan(lambda carry, _: (carry, jnp.sin(a) @ b), 0, None, length=11)[1], a, b)
    assert looped.flops == 11 * 2 * 3 * 5 * 7
    image, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 3, 4))

    def convolved(image, kernel):
        layout = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), 'SAME', dimension_numbers=layout, feature_group_count=2
        )

    assert count(jax.jit(convolved), image, kernel).flops == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    branches = count(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: 0.0), a, b)
    assert branches.flops == 2 * 3 * 5 * 7
    twice = {'cuda': lambda a, b: (jnp.concatenate([a, a]) @ b)[:3], 'default': jnp.dot}
    for forms in (twice, {'cpu': twice['default'], 'default': twice['cuda']}):  # the order does not matter
        assert count(functools.partial(jax.lax.platform_dependent, **forms), a, b).flops == 2 * 3 * 5 * 7
    assert count(jax.jit(lambda a, b: (a @ b, jnp.sin(a) @ b)[0]), a, b).flops == 2 * 3 * 5 * 7  # the rest is unused


def rows(text):
    """The cells of the printed table, by job."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| ') and cells[0] != 'job':
            found[cells[0]] = dict(zip(table.COLUMNS, cells, strict=True))
    return found


def megabytes(cell):
    number, unit = cell.split()
    return float(number) * {'MB': 1, 'GB': 1000}[unit]


TRAININGS = ['vqvae', 'prior.bottom', 'prior.top', 'classifier']


def make_program(run, name):
    """The program of a job or a training; call it outside of the mesh."""
    makers = dict(plan.make_programs(run))
    assert list(makers) == [*TRAININGS, 'extract_codes', 'sample']
    with jax.set_mesh(run.mesh):
        return makers[name]()


def compiled(run, name):
    program = make_program(run, name)
    with jax.set_mesh(run.mesh):
        return programs.compile_program(program)


@pytest.mark.system
def test_a_plan_of_the_attached_devices(config, tmp_path, capsys):
    for section in (config.vqvae, config.prior.top):
        section.hidden_channels = 32  # enough for products and convolutions to be most of the FLOPs
    config.codes.batch_size, config.sample.batch_size = 99, 15
    plan.plan(Run(config, epath.Path(tmp_path)))
    found = rows(capsys.readouterr().out)
    assert list(found) == [*TRAININGS, 'extract_codes', 'sample']
    for job in ('vqvae', 'classifier', 'extract_codes'):
        assert float(found[job]['TFLOP']) == pytest.approx(float(found[job]['XLA TFLOP']), rel=0.25)
    assert found['vqvae']['steps'] == '8' and found['sample']['steps'] == '2' and not found['extract_codes']['steps']
    assert found['extract_codes']['batch'] == '104' and found['sample']['batch'] == '16'  # padded to 8 devices
    for job in ('vqvae', 'prior.top'):  # parameters and their average, and Adam's two moments, in float32
        each = pytest.approx(8 * float(found[job]['parameters'].split()[0]), rel=0.1)
        memory = [megabytes(found[job][name]) for name in ('weights', 'optimizer', 'activations', 'peak')]
        assert memory[0] == each and memory[1] == each
        assert sum(memory[:3]) == pytest.approx(memory[3], rel=0.01)
    assert not list(tmp_path.iterdir())


def test_extraction_and_sampling_hold_sharded_weights_and_gather_them(config, tmp_path):
    config.vqvae.hidden_channels, config.parallel.fsdp = 64, 4
    config.prior.top.hidden_channels = config.prior.bottom.hidden_channels = 64
    run = Run(config, epath.Path(tmp_path))
    for name in ('extract_codes', 'sample'):
        whole = make_program(Run(config, epath.Path(tmp_path), jax.devices()[:1]), name).weights
        program = make_program(run, name)
        sharded = (whole - program.weights) * 4 / 3  # bytes; arrays of fewer than 2**14 elements are replicated
        assert sharded > 0.4 * whole
        # The finest decoder takes no part in encoding, nor the encoders in sampling.
        assert 0.2 * sharded < compiled(run, name).collective_bytes < 1.1 * sharded, name


@pytest.mark.system
def test_communication_does_not_grow_with_the_devices(config, tmp_path):
    def communication(devices, name='prior.bottom', **fields):
        config.prior.bottom.update(num_residual_blocks=4, **fields)
        run = Run(config, epath.Path(tmp_path), jax.devices()[:devices])
        return compiled(run, name).collective_bytes, 4 * make_program(run, name).parameters

    (two, parameters), (eight, _) = communication(2, 'vqvae'), communication(8, 'vqvae')
    assert parameters < eight == two < 1.2 * parameters  # the gradients, and the codebooks' sums and counts
    (two, parameters), (eight, _) = communication(2), communication(8)
    (scanned, _) = communication(8, scan_layers=True)
    assert parameters < eight <= 1.05 * parameters  # the gradients, and a few metrics
    assert eight == pytest.approx(two, rel=0.01) and scanned == pytest.approx(eight, rel=0.05)


def test_collectives_are_read_from_the_text_of_a_program():
    text = """
%twice.1 (x: s32[]) -> pred[] {
  ROOT %less = pred[] fusion(%x), kind=kLoop, calls=%compare.2
}

%compare.2 (x: s32[]) -> pred[] {
  %n = s32[] constant(2)
  ROOT %less.2 = pred[] compare(%x, %n), direction=LT
}

%body (x: s32[]) -> s32[] {
  %a = f32[8,4]{1,0} all-gather(%x), channel_id=1
}

%fused (x: s32[]) -> s32[] {
  %b = (bf16[2,3]{1,0}, f32[]) all-reduce-start(%y, %z), channel_id=2
}

ENTRY %main (x: s32[]) -> s32[] {
  %c = (bf16[2,3]{1,0}, f32[]) all-reduce-done(%b)
  %d = f32[100] add(%e, %f)
  %g = f32[8,4]{1,0} all-gather(%x), channel_id=1
  %h = s32[] while(%x), condition=%twice.1, body=%body
  %i = s32[] fusion(%x), kind=kLoop, calls=%fused
  %j = s32[] while(%x), condition=%twice.1, body=%other, backend_config={"known_trip_count":{"n":"5"}}
  %k = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), channel_id=3
  %m = s32[] conditional(%p, %x, %x), true_computation=%other, false_computation=%last
}

%other (x: s32[]) -> s32[] {
  %l = f32[3] reduce-scatter(%x)
}

%last (x: s32[]) -> s32[] {
  %o = f32[7] all-to-all(%x)
}
"""
    assert collective_bytes(parse(text)) == 2 * 4 * 32 + (2 * 6 + 4) + 5 * 4 * 3 + 4 * 32 + 4 * 7
    assert collective_bytes(parse(text.replace('constant(2)', 'parameter(0)'))) is None  # how often is not known


def test_gpus_that_are_not_attached_are_planned_for_without_a_compiler(config, tmp_path, capsys, monkeypatch):
    h200 = next(accelerator for accelerator in hardware._ACCELERATORS.values() if accelerator.name == 'H200')
    monkeypatch.setattr(hardware, '_simulated', dict.fromkeys(jax.devices(), h200))
    config.parallel.fsdp = 2
    run = Run(config, epath.Path(tmp_path))
    plan.plan(run)
    costs = []
    for config.vqvae.training.batch_size in (16, 4):  # two images a device, and one: on 4 devices and their neighbors
        costs.append(make_program(run, 'vqvae').cost)
    assert costs[0].flops == pytest.approx(2 * costs[1].flops) and costs[0].bytes < 2 * costs[1].bytes  # weights
    text = capsys.readouterr().out
    assert text.startswith('plan: tiny on 8 x H200 (not compiled), parallel.fsdp=2')
    assert 'Nothing was compiled' in text and f'pip install "jax[cuda13]=={jax.__version__}"' in text
    assert rows(text)['sample']['steps'] == '2'  # 24 in batches of 16
    for row in rows(text).values():
        assert row['bound'].endswith(' ms')
        assert not any(row[name] for name in ('peak', 'XLA TFLOP', 'collectives', 'kernels', 'moved', 'modeled'))


def test_a_program_that_does_not_fit_comes_with_the_field_to_change(config, tmp_path):
    run, device = Run(config, epath.Path(tmp_path)), hardware.Accelerator('toy', 1e12, 1e6, 1e9)

    def advice(name, peak=2_000_000, error=''):
        return list(plan.advice(run, make_program(run, name), programs.Compiled(peak=peak, error=error), device))

    assert advice('sample', peak=1_000_000) == []
    assert 'sample.batch_size' in advice('sample')[1] and 'codes.batch_size' in advice('extract_codes')[1]
    assert advice('sample')[0] == 'needs 2.00 MB, but programs can use 1.00 MB of toy'
    assert advice('sample', error='out of memory')[0] == 'out of memory'
    assert '--config.sample.dtype=bfloat16' in advice('sample')[2]
    config.sample.update(batch_size=8, dtype='bfloat16')  # nothing is left to lower
    assert advice('sample')[1:] == ['use devices with more memory']
    assert '--config.prior.top.remat=blocks' in advice('prior.top')[1]
    config.prior.top.remat = 'blocks'
    assert '.training.grad_accum_steps=2' in advice('prior.top')[1]
    device = device._replace(memory=1e4)
    assert '--config.parallel.fsdp=4' in advice('prior.top')[1]


def test_advice_about_a_gpu(config, tmp_path):
    run, device = Run(config, epath.Path(tmp_path)), hardware.Accelerator('toy', 1e12, 1e6, 1e9, 5e11, 1e11)
    program = make_program(run, 'sample')

    def advice(**statistics):
        return list(plan.advice(run, program, programs.Compiled(**statistics), device))

    assert advice(peak=750_000) == []
    assert advice(peak=750_001) == [
        'set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 75% of the memory of a GPU by default'
    ]
    assert 'sample.batch_size' in advice(peak=950_001)[1]  # the rest is the driver's
    assert advice(peak=1, uncounted='a loop') == ['no modeled time: a loop']


@pytest.mark.parametrize('devices, fsdp, advised', [(8, 2, 8), (6, 1, 6), (5, 1, 5), (8, 4, 8)])
def test_the_advised_fsdp_divides_the_devices(config, tmp_path, devices, fsdp, advised):
    config.parallel.fsdp = fsdp
    config.classifier.training.batch_size = 2 * 3 * 5 * 8
    run = Run(config, epath.Path(tmp_path), jax.devices()[:devices])
    program = make_program(run, 'classifier')
    device = hardware.Accelerator('toy', 1e12, program.state, 1e9)
    lines = list(plan.advice(run, program, programs.Compiled(peak=2 * program.state), device))
    assert f'--config.parallel.fsdp={advised}' in lines[1]
    config.parallel.fsdp = advised
    assert Run(config, epath.Path(tmp_path), jax.devices()[:devices]).mesh.size == devices


def test_topologies_that_do_not_exist():
    for name in ('v5e', 'v9:2x2', 'h100'):
        with pytest.raises(JobError, match=rf'--topology={name}: .*v5e:4x8.*v6e:16x16'):
            hardware.topology_devices(name)


@pytest.mark.system
@pytest.mark.skipif(not hardware.has_gpu_compiler(), reason="JAX's CUDA plugin is not installed")
def test_gpus_that_are_not_attached_are_compiled_for(config, tmp_path, capsys):
    config.parallel.fsdp = 2
    plan.plan(Run(config, epath.Path(tmp_path), hardware.topology_devices('h100:2')))
    text = capsys.readouterr().out
    assert text.startswith('plan: tiny on 2 x NVIDIA H100 80GB HBM3, parallel.fsdp=2')
    assert 'not compiled' not in text and 'no modeled time' not in text
    for row in rows(text).values():
        assert re.fullmatch(r'.*B \(\d+%\)', row['peak']) and int(row['kernels']) > 10
        modeled, bound = (float(row[name].removesuffix(' ms')) for name in ('modeled', 'bound'))
        assert modeled > bound and modeled > 0.995 * 1.5e-3 * int(row['kernels'])  # rounded to three digits


@pytest.mark.system
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
def test_a_slice_that_is_not_attached(config, tmp_path, capsys):
    devices = hardware.topology_devices('v5e:2x4')
    assert len(devices) == 8 and hardware.hardware_of(devices[0]).name == 'v5e'
    config.parallel.fsdp = 4
    plan.plan(Run(config, epath.Path(tmp_path), devices))
    text = capsys.readouterr().out
    assert text.startswith('plan: tiny on 8 x TPU v5 lite, parallel.fsdp=4')
    assert re.search(r'\| sample \| 16 .* ms \|', text)
    assert all(re.fullmatch(r'.*B \(\d+%\)', row['peak']) for row in rows(text).values())
    assert all(row['bound'].endswith(' ms') for row in rows(text).values())
    with pytest.raises(JobError, match='--topology=v5e:3x9: .*choose one such as v4:2x2x1'):
        hardware.topology_devices('v5e:3x9')
    assert len(hardware.topology_devices('v4:2x2x1')) == 4  # chips, not cores


@pytest.mark.system
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
@pytest.mark.parametrize('name', ['v5e:4x8', 'v6e:4x4', 'v4:2x2x4'])
def test_extraction_and_sampling_compile_for_slices_of_many_hosts(config, tmp_path, name):
    config.codes.batch_size = config.sample.batch_size = 64
    run = Run(config, epath.Path(tmp_path), hardware.topology_devices(name))
    assert processes.num_processes(run.mesh) == run.mesh.size // 4
    for job in ('extract_codes', 'sample'):
        assert compiled(run, job).peak
