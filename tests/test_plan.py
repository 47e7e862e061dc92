"""Plans: FLOPs against arithmetic and XLA, communication that does not grow with devices, errors, a TPU compiler."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from vqvae2_jax.distributed import processes, sharding
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.planning import hardware, plan
from vqvae2_jax.planning.cost import Cost, count


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


def rows(text):
    """The cells of the printed table, by job."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| ') and cells[0] != 'job':
            found[cells[0]] = dict(zip(plan.COLUMNS, cells, strict=True))
    return found


def megabytes(cell):
    number, unit = cell.split()
    return float(number) * {'MB': 1, 'GB': 1000}[unit]


def test_a_plan_of_the_devices_at_hand(config, tmp_path, capsys):
    config.vqvae.hidden = config.prior.top.hidden = 32  # enough that what is counted is most of what there is
    plan.plan(Run(config, epath.Path(tmp_path)))
    found = rows(capsys.readouterr().out)
    assert list(found) == ['vqvae', 'prior.bottom', 'prior.top', 'classifier', 'sample']
    for job in ('vqvae', 'classifier'):
        assert float(found[job]['TFLOP']) == pytest.approx(float(found[job]['XLA counts']), rel=0.25)
    assert found['vqvae']['steps'] == '8' and found['sample']['batch'] == '16'
    for job in ('vqvae', 'prior.top'):  # parameters and their average, and Adam's two moments, in float32
        each = pytest.approx(8 * float(found[job]['parameters'].split()[0]), rel=0.1)
        memory = [megabytes(found[job][name]) for name in ('weights', 'optimizer', 'activations', 'peak')]
        assert memory[0] == each and memory[1] == each
        assert sum(memory[:3]) == pytest.approx(memory[3], rel=0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.system
def test_communication_does_not_grow_with_the_devices(config, tmp_path):
    def traffic(devices, job='prior.bottom', **fields):
        config.prior.bottom.update(layers=4, **fields)
        with parallel.use(sharding.make_mesh(jax.devices()[:devices])):
            program = plan._training(Run(config, epath.Path(tmp_path)), job)
            return plan._compile(program).traffic, 4 * program.parameters

    (two, parameters), (eight, _) = traffic(2, 'vqvae'), traffic(8, 'vqvae')
    assert parameters < eight == two < 1.2 * parameters  # the gradients, and the codebooks' sums and counts
    (two, parameters), (eight, _), (looped, _) = traffic(2), traffic(8), traffic(8, scan_layers=True)
    assert parameters < eight <= 1.05 * parameters  # the gradients, and a few metrics
    assert eight == pytest.approx(two, rel=0.01) and looped == pytest.approx(eight, rel=0.05)


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
    assert plan.collective_bytes(text) == 2 * 4 * 32 + (2 * 6 + 4) + 5 * 4 * 3 + 4 * 32 + 4 * 7
    assert plan.collective_bytes(text.replace('constant(2)', 'parameter(0)')) is None  # how often is not known


def test_gpus_that_are_not_there_are_planned_for_by_arithmetic(config, tmp_path, capsys, monkeypatch, request):
    h200 = next(chip for chip in hardware._CHIPS.values() if chip.name == 'H200')
    monkeypatch.setattr(hardware, '_stood_for', dict.fromkeys(jax.devices(), h200))
    run = Run(config, epath.Path(tmp_path))
    monkeypatch.setattr(parallel, '_imagined_process', {})
    processes.simulate_hosts(jax.devices(), 4)
    request.addfinalizer(processes.num_processes.cache_clear)
    with parallel.use(sharding.make_mesh(fsdp=2)):
        plan.plan(run)
        costs = []
        for config.vqvae.training.batch_size in (16, 4):  # two images a device, and one: in pairs, alike
            costs.append(plan._training(run, 'vqvae').cost)
    assert costs[0].flops == pytest.approx(2 * costs[1].flops) and costs[0].bytes < 2 * costs[1].bytes  # weights
    text = capsys.readouterr().out
    assert text.startswith('tiny on 8 x H200, by arithmetic')
    assert rows(text)['sample']['steps'] == '1'  # 24 in batches of 16, one for each of two processes
    for row in rows(text).values():
        assert row['step'].endswith(' ms') and not (row['peak'] or row['XLA counts'] or row['traffic'])


def test_topologies_that_are_none():
    for name in ('v5e', 'v9:2x2', 'h100'):
        with pytest.raises(JobError, match=rf'--topology={name}: .*v5e:4x8.*v6e:16x16'):
            hardware.topology_devices(name)


@pytest.mark.system
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
def test_a_slice_that_is_not_there(config, tmp_path, capsys):
    devices = hardware.topology_devices('v5e:2x4')
    assert len(devices) == 8 and hardware.hardware_of(devices[0]).name == 'v5e'
    with parallel.use(sharding.make_mesh(devices, 4)):
        plan.plan(Run(config, epath.Path(tmp_path)))
    text = capsys.readouterr().out
    assert text.startswith('tiny on 8 x TPU v5 lite, parallel.fsdp=4') and re.search(r'\| sample \| 16 .* ms \|', text)
    assert all(re.fullmatch(r'.*B \(\d+%\)', row['peak']) for row in rows(text).values())
    assert all(row['step'].endswith(' ms') for row in rows(text).values())
    with parallel.use(sharding.make_mesh(devices)):
        assert [mesh.size for mesh in parallel.meshes_alone()] == [4]
    with pytest.raises(JobError, match='--topology=v5e:3x9: .*there are v4:2x2x1'):
        hardware.topology_devices('v5e:3x9')
    assert len(hardware.topology_devices('v4:2x2x1')) == 4  # chips, not cores


@pytest.mark.system
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
def test_a_process_draws_on_each_chip_where_the_others_cannot_be_left_out(config, tmp_path):
    run = Run(config, epath.Path(tmp_path))
    for slice_, sizes in (('v6e:4x4', [1] * 4), ('v4:2x2x4', [4])):
        with parallel.use(sharding.make_mesh(hardware.topology_devices(slice_))):
            assert [mesh.size for mesh in parallel.meshes_alone()] == sizes, slice_
    with parallel.use(sharding.make_mesh(hardware.topology_devices('v5e:4x8'))):
        assert processes.num_processes(sharding.current_mesh()) == 8
        alone = parallel.meshes_alone()
    with parallel.use(alone[0]):
        compiled = plan._compile(plan._sampling(run, 32))
    assert [mesh.size for mesh in alone] == [1] * 4 and compiled.peak
