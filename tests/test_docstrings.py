"""Every public function of the package says what it takes and gives: a docstring and full types."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'vqvae2_jax'
MODULES = sorted(path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py')


def public_functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef, bool]]:
    """(name, node, whether it is a method) of public functions, and public methods of public classes."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            found.append((node.name, node, False))
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found += [(f'{node.name}.{m.name}', m, True) for m in methods if not m.name.startswith('_')]
    return found


def problems(source: str) -> list[str]:
    """The public functions of a module that lack a docstring or a type, and classes without docstring."""
    tree, found = ast.parse(source), []
    if not ast.get_docstring(tree):
        found.append('the module has no docstring')
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_') and not ast.get_docstring(node):
            found.append(f'{node.name} has no docstring')
    for name, node, is_method in public_functions(tree):
        static = any(isinstance(d, ast.Name) and d.id == 'staticmethod' for d in node.decorator_list)
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        arguments = [a for a in every if a is not None][is_method and not static :]
        untyped = [a.arg for a in arguments if a.annotation is None]
        if untyped:
            found.append(f'{name}: {", ".join(untyped)} without type')
        if node.returns is None and node.name != 'setup':  # of a Flax module
            found.append(f'{name}: no return type')
        is_property = any(isinstance(d, ast.Name) and d.id == 'property' for d in node.decorator_list)
        inherited = name.rpartition('.')[2] in ('setup', 'to_json')
        if not ast.get_docstring(node) and not is_property and not inherited and not is_override(node):
            found.append(f'{name} has no docstring')
    return found


def is_override(node: ast.FunctionDef) -> bool:
    """Whether a method repeats one that a base class or a protocol documents."""
    return node.name in {'example_name', 'fingerprint', 'get_state', 'set_state', 'start_prefetch', 'check'}


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_functions_are_documented_and_typed(path):
    assert not problems(path.read_text())


@pytest.mark.parametrize(
    'source, problem',
    [
        ('def f() -> None:\n  """Does."""', 'the module has no docstring'),
        ('"""M."""\ndef f() -> None: ...', 'f has no docstring'),
        ('"""M."""\ndef f(x) -> None:\n  """Does."""', 'f: x without type'),
        ('"""M."""\ndef f(*x):\n  """Does."""', 'f: no return type'),
        ('"""M."""\nclass C: ...', 'C has no docstring'),
        ('"""M."""\nclass C:\n  """C."""\n  def f(self, x) -> int:\n    """Does."""', 'C.f: x without type'),
    ],
)
def test_problems_are_found(source, problem):
    assert problem in problems(source)
