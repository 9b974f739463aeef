"""Design rules beyond the import contracts in pyproject.toml."""

import ast
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssl_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 60
DIFFERENTIATORS = {
    *("grad", "value_and_grad", "vjp", "jvp", "linearize", "linear_transpose", "hessian"),
    *("jacfwd", "jacrev", "jacobian", "value_and_jacfwd", "value_and_jacrev", "fwd_and_bwd"),
}
CUSTOM_RULES = {"custom_vjp", "custom_jvp", "custom_gradient"}
MESHES_AND_MAPS = {
    *("shard_map", "smap", "pmap", "soft_pmap", "xmap", "Mesh", "AbstractMesh", "make_mesh"),
    *("create_device_mesh", "create_hybrid_device_mesh", "set_mesh", "use_mesh"),
}
ARRAY_LIBRARIES = {"jax", "flax", "optax"}
OPTIONAL_PACKAGES = {"array_record", "matplotlib", "pyarrow", "tensorflow", "tensorflow_datasets"}
OPTIONAL_PACKAGES |= {"datasets", "imagecodecs", "tifffile", "torch", "wandb"}
LAZY_IMPORTS = {("cli/doctor.py", "jax")}  # doctor survives a broken JAX
# Calls of `importlib.import_module`: TensorFlow is imported on first use, main imports the command,
# and doctor checks each package.
DYNAMIC_IMPORTS = {"cli/main.py": 1, "cli/doctor.py": 1, "data/tensorflow.py": 2}

Check = Callable[[str, ast.Module], Iterator[str]]


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Maps names in a file to the dotted names of what they import."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def outside_names(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    """Yields line and parts of every dotted name that a file imports or accesses by an import."""
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, [*node.module.split("."), alias.name]
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            value = node.value
            while isinstance(value, ast.Attribute):
                parts.insert(0, value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in names:
                yield node.lineno, [*names[value.id].split("."), *parts]


def uses(tree: ast.Module, forbidden: set[str]) -> Iterator[str]:
    for line, parts in outside_names(tree):
        if parts[0] in ARRAY_LIBRARIES and parts[-1] in forbidden:
            yield f"{line}: {'.'.join(parts)}"


def only_step_differentiates(path: str, tree: ast.Module) -> Iterator[str]:
    # On some platforms, convolution and pooling use JAX's own backward passes.
    allowed = {"linear_transpose", "vjp"} if path == "models/conv.py" else set()
    if path != "step.py":
        yield from uses(tree, DIFFERENTIATORS - allowed)
    if path not in ("step.py", "losses.py", "models/conv.py"):
        yield from uses(tree, CUSTOM_RULES)


def only_spmd_builds_meshes_and_maps(path: str, tree: ast.Module) -> Iterator[str]:
    if path != "spmd.py":
        yield from uses(tree, MESHES_AND_MAPS)


def functions_are_short(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_LINES:
                yield f"{node.lineno}: {node.name} has {lines} lines, more than {MAX_LINES}"


def no_string_is_parsed_as_code(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile"):
            yield f"{node.lineno}: {node.id}"
    for line, parts in outside_names(tree):
        if parts[0] == "builtins" and parts[-1] in ("eval", "exec", "compile"):
            yield f"{line}: {'.'.join(parts)}"


def no_private_names_of_others(path: str, tree: ast.Module) -> Iterator[str]:
    for line, parts in outside_names(tree):
        # os._exit is public in spite of its name.
        if parts[0] == "ssl_jax" or parts == ["os", "_exit"]:
            continue
        if any(part.startswith("_") and not part.endswith("__") for part in parts):
            yield f"{line}: {'.'.join(parts)}"


def imports_are_at_the_top(path: str, tree: ast.Module) -> Iterator[str]:
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {(node.lineno, alias.name) for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.lineno, node.module or "."))
    for line, module in sorted(found):
        optional = module.split(".")[0] in OPTIONAL_PACKAGES
        if not optional and (path, module) not in LAZY_IMPORTS:
            yield f"{line}: {module} is imported inside a function"
    dynamic = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id)
        in ("import_module", "__import__")
    ]
    if len(dynamic) > DYNAMIC_IMPORTS.get(path, 0):
        yield f"{dynamic[-1]}: dynamic import"


def only_the_command_line_prints(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith("cli/") or path in ("train/loop.py", "run/log.py"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"{node.lineno}: print"


def threads_end_with_the_process(path: str, tree: ast.Module) -> Iterator[str]:
    # Python joins the threads of executors at exit, even if a file system has stalled.
    for name in imported_names(tree).values():
        if name.startswith(("concurrent", "multiprocessing")):
            yield f"1: {name}; see data/reader.py"


def no_utils_modules(path: str, tree: ast.Module) -> Iterator[str]:
    if {"util", "utils"} & set(path.removesuffix(".py").split("/")):
        yield "1: name a file after its contents"


RULES: dict[Check, list[tuple[str, str]]] = {
    only_step_differentiates: [
        ("train/loop.py", "import jax\njax.grad(f)"),
        ("evals/finetune.py", "import jax as j\nj.value_and_grad(f)(x)"),
        ("ema.py", "from jax import vjp as pull"),
        ("models/heads.py", "import flax.linen as nn\nnn.vjp(f, m)"),
        ("models/conv.py", "import jax\njax.grad(f)(x)"),
        ("optim.py", "import jax.numpy as jnp\nimport jax\njax.jacrev(f)"),
        ("models/resnet.py", "import jax\n@jax.custom_vjp\ndef f(x): ..."),
    ],
    only_spmd_builds_meshes_and_maps: [
        ("train/loop.py", "import jax\njax.make_mesh((8,), ('d',))"),
        ("step.py", "from jax import shard_map"),
        ("step.py", "from jax.experimental.shard_map import shard_map"),
        ("losses.py", "import jax\n@jax.pmap\ndef f(x): ..."),
        ("evals/knn.py", "import jax\njax.sharding.Mesh(d, 'x')"),
        ("run/checkpoint.py", "from jax.sharding import Mesh"),
        ("data/index.py", "from jax.experimental import mesh_utils as m\nm.create_device_mesh(s)"),
    ],
    functions_are_short: [
        ("train/loop.py", "def f():\n" + "    x = 1\n" * MAX_LINES),
        ("train/loop.py", "class A:\n    async def f():\n" + "        x = 1\n" * MAX_LINES),
    ],
    no_string_is_parsed_as_code: [
        ("config.py", "eval('1 + 1')"),
        ("config.py", "list(map(exec, lines))"),
        ("config.py", "import builtins\nbuiltins.eval('1')"),
        ("config.py", "compile('1', 'f', 'eval')"),
    ],
    no_private_names_of_others: [
        ("step.py", "from jax._src import core"),
        ("step.py", "import jax._src.core"),
        ("step.py", "from flax.linen import _hidden"),
        ("step.py", "import numpy as np\nnp._core.x()"),
        ("step.py", "import optax\noptax._src"),
    ],
    imports_are_at_the_top: [
        ("train/loop.py", "def f():\n    import json"),
        ("cli/evals.py", "def f():\n    if x:\n        from ssl_jax.report import write_report"),
        ("data/sources.py", "class A:\n    async def f():\n        import sklearn.datasets"),
        ("__init__.py", "def f():\n    from ssl_jax.train import pretrain"),
        ("cli/doctor.py", "def f():\n    import jax.numpy"),
        ("cli/evals.py", "import importlib\nimportlib.import_module('jax')"),
        ("cli/evals.py", "from importlib import import_module\nimport_module('jax')"),
        ("cli/main.py", "import importlib\n" + "importlib.import_module('jax')\n" * 2),
        ("step.py", "__import__('jax')"),
    ],
    only_the_command_line_prints: [
        ("step.py", "print(1)"),
        ("data/pipeline.py", "def f(log=print): ..."),
    ],
    threads_end_with_the_process: [
        ("data/tfds.py", "from concurrent.futures import ThreadPoolExecutor"),
        ("data/host.py", "import concurrent.futures"),
        ("data/records.py", "from multiprocessing.pool import ThreadPool"),
    ],
    no_utils_modules: [
        ("data/utils.py", ""),
        ("utils/arrays.py", ""),
    ],
}
ALLOWED: list[tuple[Check, str, str]] = [
    (only_step_differentiates, "step.py", "import jax\njax.value_and_grad(f)"),
    (only_step_differentiates, "losses.py", "import jax\n@jax.custom_vjp\ndef f(x): ..."),
    (only_step_differentiates, "models/conv.py", "import jax\n@jax.custom_vjp\ndef f(x): ..."),
    (only_step_differentiates, "models/conv.py", "import jax\njax.linear_transpose(f, x)"),
    (only_step_differentiates, "losses.py", "def grad(x): ...\ngrad(1)"),
    (only_spmd_builds_meshes_and_maps, "spmd.py", "from jax import shard_map"),
    (only_spmd_builds_meshes_and_maps, "train/loop.py", "from ssl_jax.spmd import Mesh"),
    (only_spmd_builds_meshes_and_maps, "config.py", "MODES = ('shard_map', 'pmap')"),
    (functions_are_short, "train/loop.py", "def f():\n" + "    x = 1\n" * (MAX_LINES - 1)),
    (no_string_is_parsed_as_code, "config.py", "import ast\nast.literal_eval('1')"),
    (no_string_is_parsed_as_code, "plan.py", "lowered.compile()"),
    (no_private_names_of_others, "step.py", "import jax\njax.__version__"),
    (no_private_names_of_others, "step.py", "self._private()\nfrom ssl_jax.a import _b"),
    (imports_are_at_the_top, "run/wandb.py", "def f():\n    import wandb"),
    (imports_are_at_the_top, "data/tensorflow.py", "try:\n    import json\nexcept E:\n    pass"),
    (imports_are_at_the_top, "cli/main.py", "import importlib\nimportlib.import_module(m)"),
    (imports_are_at_the_top, "cli/doctor.py", "def f():\n    import jax"),
    (only_the_command_line_prints, "cli/main.py", "print(1)"),
    (threads_end_with_the_process, "data/reader.py", "import threading"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule: Check) -> None:
    assert FILES
    broken = [
        f"ssl_jax/{name}:{found}"
        for name in (file.relative_to(PACKAGE).as_posix() for file in FILES)
        for found in rule(name, ast.parse((PACKAGE / name).read_text()))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [(rule, *case) for rule, cases in RULES.items() for case in cases],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_rule_rejects_code_that_breaks_it(rule: Check, path: str, source: str) -> None:
    assert list(rule(path, ast.parse(source)))


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_rule_accepts_other_code(rule: Check, path: str, source: str) -> None:
    assert not list(rule(path, ast.parse(source)))


def test_each_mutation_finds_the_code_that_it_breaks() -> None:
    root = PACKAGE.parent
    mutations = runpy.run_path(str(root / ".ci" / "mutations.py"))["MUTATIONS"]
    lost = [each.name for each in mutations if (root / each.file).read_text().count(each.old) != 1]
    assert mutations and not lost
