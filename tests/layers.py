"""The layers: main -> jobs -> api, training, evaluation, planning -> tasks, sampling, metrics -> models.

Kernels stand between: they import models, and only jobs, planning and config give them to modules. The infrastructure
(io, data, distributed, config) stands beside the layers. The rules are checked on the syntax tree of every module,
imports inside functions included. `violations` takes the sources as a dict, so that `test_layers` can show that each
rule fails on a bad source.
"""

import ast
import collections
import pathlib

PACKAGE = 'vqvae2_jax'
ROOT = pathlib.Path(__file__).parents[1] / PACKAGE

INFRASTRUCTURE = {'io', 'data', 'distributed', 'config', 'version', 'xla_flags'}
LOGIC = {'api', 'training', 'evaluation', 'planning'}  # pure functions of plain values
MODEL_CODE = {'tasks', 'sampling', 'metrics', 'models'}
# Jobs that use trained networks do so by the API alone, as notebooks do.
API_JOBS = {'sample', 'extract_codes', 'inpaint', 'likelihood', 'reconstruct', 'workdir'}
API_JOBS |= {'serve', 'page', 'page_layout'}
ABOVE_MODEL_CODE = {'main', 'jobs', 'kernels'} | LOGIC | INFRASTRUCTURE
# The layers that each layer must not import. Every directory and top-level module of the package has an entry.
FORBIDDEN = dict.fromkeys(INFRASTRUCTURE, {'main', 'jobs', 'kernels'} | LOGIC | MODEL_CODE) | {
    'main': MODEL_CODE,
    '__main__': set(),  # it prepares the terminal before it imports the command line
    'jobs': {'main'},
    'api': {'main', 'jobs', 'kernels'} | LOGIC - {'api'},
    'generator': {'main', 'jobs', 'kernels', 'weights'} | LOGIC,
    'weights': {'main', 'jobs', 'kernels'},
    'training': {'main', 'jobs', 'kernels'},
    'evaluation': {'main', 'jobs', 'kernels'},
    'planning': {'main', 'jobs'},
    'config': {'main', 'jobs', 'api', 'evaluation', 'planning'},  # it builds modules and training settings
    'kernels': {'main', 'jobs'} | LOGIC | INFRASTRUCTURE - {'distributed'} | MODEL_CODE - {'models'},
    'tasks': ABOVE_MODEL_CODE,
    'sampling': ABOVE_MODEL_CODE | {'tasks', 'metrics'},
    'metrics': ABOVE_MODEL_CODE | {'tasks', 'sampling'},
    'models': ABOVE_MODEL_CODE | MODEL_CODE - {'models'},
}
# Names of several modules, which mean the same in each: a network and the task that trains it, a layer and its kernel.
# Plurals count as equal.
SHARED_NAMES = {'vqvae', 'prior', 'classifier', 'attention'}

# Packages that a layer does without.
FOREIGN = {'metrics': {'flax', 'optax', 'orbax', 'chex'}}
FLAG_MODULES = ('absl.flags', 'ml_collections.config_flags')
# grain's worker processes read absl's flags; where nobody parsed any (a notebook), the loader says so.
FLAG_READERS = {'main', 'data.loader'}
# Only `distributed` and its callers name devices: model code is written for whole arrays.
DEVICE_NAMES = {
    'psum',
    'pmean',
    'pmax',
    'pmin',
    'all_gather',
    'axis_name',
    'axis_index',
    'shard_map',
    'with_sharding_constraint',
}
DEVICE_FREE = {'tasks', 'sampling', 'models', 'kernels'}
# One function selects implementations by the platform. The rest compile for it, export programs, set flags, or report.
PLATFORMS = {'cpu', 'gpu', 'tpu', 'cuda', 'rocm'}
PLATFORM_MODULES = {'kernels.select', 'weights.exported', 'xla_flags', 'jobs.report_files', 'io.state_dict'}
PLATFORM_LAYERS = {'planning'}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_DEPTH = 400, 60, 7


def layer_of(module: str) -> str:
    """vqvae2_jax.models.prior -> models; the package itself -> ''."""
    return module.partition('.')[2].partition('.')[0]


def imports_of(module: str, tree: ast.Module, is_package: bool) -> set[str]:
    """Dotted names that a module imports, relative ones resolved; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = module.split('.')
                parts = parts[: len(parts) - node.level + is_package]
                base = '.'.join([*parts, base] if base else parts)
            names |= {f'{base}.{alias.name}' for alias in node.names}
    return names


def private_uses(tree: ast.Module, imports: set[str]) -> set[str]:
    """Private names of other packages, imported or reached through an imported module (jax._src)."""

    def is_private(part):
        return part.startswith('_') and not part.startswith('__')

    foreign = {name for name in imports if name.partition('.')[0] != PACKAGE}
    found = {name for name in foreign if any(is_private(part) for part in name.split('.'))}
    bound = {
        alias.asname or alias.name.partition('.')[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if not (getattr(node, 'module', None) or alias.name).startswith(PACKAGE)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in bound:
                found.add(ast.unparse(node))
    return found - {'os._exit'}  # which Python documents


def identifiers(tree: ast.Module) -> set[str]:
    """Every name, attribute, keyword, argument and imported name in the code (not in comments or strings)."""
    found = set()
    for node in ast.walk(tree):
        for field in ('id', 'attr', 'arg', 'name'):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.update(value.split('.'))
    return found


def platform_uses(tree: ast.Module) -> set[str]:
    """Platforms as strings, and attributes of devices that tell them. `platform_dependent` takes names as keywords."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return strings & PLATFORMS | attributes & {'platform', 'compute_capability'}


def module_violations(module: str, source: str, tree: ast.Module, imports: set[str]) -> list[str]:
    """The broken rules of one module."""
    layer, found = layer_of(module), []
    if layer and layer not in FORBIDDEN:
        found.append(f'unknown layer {layer!r}: give it an entry in FORBIDDEN')
    for name in sorted(imports):
        if name.partition('.')[0] == PACKAGE and layer_of(name) in FORBIDDEN.get(layer, ()):
            found.append(f'imports {name}, which {layer} must not')
        if module.partition('.')[2] in {f'jobs.{job}' for job in API_JOBS} and layer_of(name) in MODEL_CODE - {
            'metrics'
        }:
            found.append(f'imports {name}, which {module.partition(".")[2]} must not: call the API')
        if name.partition('.')[0] in FOREIGN.get(layer, ()):
            found.append(f'imports {name}: {layer} take NumPy in and give floats out')
        if module.partition('.')[2] not in FLAG_READERS and any(
            f'{name}.'.startswith(f'{flags}.') for flags in FLAG_MODULES
        ):
            found.append(f'imports {name}: flags belong to main')
    found += [f'uses the private name {name}' for name in sorted(private_uses(tree, imports))]
    if 'default_backend' in identifiers(tree):
        found.append('calls default_backend, which is wrong while a program is compiled for devices that are absent')
    if module.partition('.')[2] not in PLATFORM_MODULES and layer not in PLATFORM_LAYERS:
        found += [f'names a platform, which kernels.select does: {name}' for name in sorted(platform_uses(tree))]
    if layer in DEVICE_FREE:
        found += [f'names a device operation: {name}' for name in sorted(identifiers(tree) & DEVICE_NAMES)]
    if len(source.splitlines()) > MAX_FILE_LINES:
        found.append(f'has {len(source.splitlines())} lines, more than {MAX_FILE_LINES}')
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f'function {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}')
    return [f'{module}: {violation}' for violation in found]


def import_graph(imports: dict[str, set[str]]) -> dict[str, list[str]]:
    """module -> modules of the package that it imports; `from package.module import name` counts as package.module."""

    def known(name):
        return name if name in imports else name.rpartition('.')[0]

    return {module: sorted({known(name) for name in names} & imports.keys()) for module, names in imports.items()}


def cycle(graph: dict[str, list[str]]) -> list[str]:
    """A chain of imports that ends where it begins, or []."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for target in graph[module]:
            if ring := visit(target):
                return ring
        done.add(path.pop())
        return []

    return next((ring for module in sorted(graph) if (ring := visit(module))), [])


def duplicate_names(modules: list[str]) -> list[str]:
    """Pairs of modules in different directories with one name, which is not in `SHARED_NAMES`."""
    by_name = collections.defaultdict(list)
    for module in modules:
        by_name[module.rpartition('.')[2].removesuffix('s')].append(module)
    shared = {name.removesuffix('s') for name in SHARED_NAMES}
    return [' and '.join(found) for name, found in sorted(by_name.items()) if len(found) > 1 and name not in shared]


def deepest(graph: dict[str, list[str]], start: str) -> list[str]:
    """The shortest chain of imports from `start` to the module that lies farthest from it, both ends included."""
    chains, queue = {start: [start]}, collections.deque([start])
    while queue:
        module = queue.popleft()
        for target in graph[module]:
            if target not in chains:
                chains[target] = [*chains[module], target]
                queue.append(target)
    return max(chains.values(), key=len)


def violations(sources: dict[str, str]) -> list[str]:
    """All broken rules of a package given as module -> source; `a.__init__` stands for package `a`."""
    imports, found = {}, []
    for name, source in sources.items():
        module, tree = name.removesuffix('.__init__'), ast.parse(source)
        imports[module] = imports_of(module, tree, is_package=name != module)
        found += module_violations(module, source, tree, imports[module])
    files = [name for name in sources if not name.endswith('.__init__')]
    found += [f'one name, which SHARED_NAMES lacks: {pair}' for pair in duplicate_names(files)]
    graph = import_graph(imports)
    if ring := cycle(graph):
        return [*found, f'import cycle: {" -> ".join(ring)}']
    if f'{PACKAGE}.main' in graph:
        chain = deepest(graph, f'{PACKAGE}.main')
        if len(chain) - 1 > MAX_DEPTH:
            found.append(f'imports are {len(chain) - 1} deep, more than {MAX_DEPTH}: {" -> ".join(chain)}')
    return found


def package_sources() -> dict[str, str]:
    return {
        '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts): path.read_text()
        for path in sorted(ROOT.rglob('*.py'))
    }
