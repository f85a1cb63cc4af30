"""The shape of the code: who may import whom, which door leads to which library, how long anything
may be."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import REPO
from there import there

import harness
from harness import cli

HOUSE = REPO / "harness"
FILES = sorted(HOUSE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}
MODULES = {
    file: ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    for file in FILES
}
PARTS = sorted({name.split(".")[1] for name in MODULES.values() if "." in name})
BY_NAME = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))


def layers() -> dict[str, int]:
    """Every part of the package and its height, as the package's docstring draws it."""
    drawn = [
        line.strip()
        for line in (harness.__doc__ or "").partition("one door:")[2].splitlines()
        if line.strip()
    ]
    return {
        part.strip(): len(drawn) - at for at, line in enumerate(drawn) for part in line.split(",")
    }


def imported(tree: ast.AST, *, own: bool = True) -> set[str]:
    """The full names of all modules that are imported anywhere in the tree, in functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if (name == "harness" or name.startswith("harness.")) == own}


def part_of(name: str) -> str:
    """harness.data.plan belongs to "data"; what harness exports lazily belongs to where it comes
    from."""
    part = name.split(".")[1] if "." in name else ""
    return {
        "init": "run",
        "Run": "run",
        "Task": "task",
        "HarnessError": "errors",
        "__main__": "cli",
    }.get(part, part)


def test_the_docstring_draws_every_part_of_the_package():
    assert set(PARTS) - {"tasks", "__main__"} == set(layers())
    assert (
        layers()["errors"]
        < layers()["store"]
        < layers()["data"]
        < layers()["state"]
        < layers()["run"]
        < layers()["cli"]
    )


def test_the_map_names_every_room_and_only_modules_that_are_there():
    page = (HOUSE / "README.md").read_text()
    map_ = page[page.index("## Map") : page.index("## How to add")]
    named = set(re.findall(r"`([^`]+)`", map_)) - {"__init__", "init", "state_dict"}
    rooms = {
        f"{path.name}/"
        for path in HOUSE.iterdir()
        if path.is_dir() and (path / "__init__.py").exists()
    }
    modules = {file.stem for file in FILES} | {file.name for file in FILES}
    assert named - rooms - modules == set()
    assert rooms - named <= {"tasks/"}


@BY_NAME
def test_imports_only_go_down(file):
    height = layers() | {"tasks": layers()["task"] + 0.5}
    own = part_of(MODULES[file])
    if own == "":
        assert {part_of(name) for name in imported(TREES[file])} <= {
            "",
            "errors",
            "exchange",
            "meta",
            "run",
            "task",
        }
        return
    for name in imported(TREES[file]):
        part = part_of(name)
        if part == "" or part == own:
            continue
        assert height[part] < height[own], f"{MODULES[file]} imports {name}, which is not below it"


def test_built_in_tasks_need_only_what_a_task_needs():
    for file in FILES:
        if part_of(MODULES[file]) == "tasks":
            assert {part_of(name) for name in imported(TREES[file])} <= {
                "task",
                "errors",
                "tasks",
                "",
            }


def test_nobody_imports_the_facade_at_the_top_of_a_module():
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.Import):
                assert "harness" not in {alias.name for alias in node.names}, file


def _eager(tree: ast.Module) -> set[str]:
    return {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
    }


def test_there_are_no_import_cycles():
    names = set(MODULES.values())
    graph = {
        MODULES[file]: {name for name in _eager(tree) if name in names} - {"harness"}
        for file, tree in TREES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == names


# What a loop needs only sometimes, and what builds everything else: both are imported when they
# are used.
GATES = {
    "harness.run.assembly",
    "harness.exchange.weights",
    "harness.ema",
    "harness.distributed.fsdp",
    "harness.meta.materialize",
}


def _without_types(tree: ast.Module) -> ast.Module:
    """The tree without what is imported for type checkers only."""

    class Cut(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Cut().visit(ast.parse(ast.unparse(tree)))


def test_the_path_of_a_step_is_short():
    """From `train.py` to the end of a step, imports in functions and through the facade followed,
    up to the gates."""
    homes = {
        alias.name: there(node.module)
        for node in ast.walk(TREES[HOUSE / "__init__.py"])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names, lines, needed = set(MODULES.values()), {}, {}
    for file, tree in TREES.items():
        kept = _without_types(tree)
        facade = {
            homes[n.attr]
            for n in ast.walk(kept)
            if isinstance(n, ast.Attribute)
            and ast.unparse(n.value) == "harness"
            and n.attr in homes
        }
        needed[MODULES[file]] = ((imported(kept) | facade) & names) - {"harness", MODULES[file]}
        lines[MODULES[file]] = len([line for line in file.read_text().splitlines() if line.strip()])
    path, frontier, hops = {"harness.train"}, {"harness.train"}, 0
    while frontier := {other for name in frontier for other in needed[name]} - path - GATES:
        path, hops = path | frontier, hops + 1
    assert {"harness.run.api", "harness.run.loop", "harness.step"} < path
    assert hops <= 3
    assert len(path) <= 30
    assert sum(lines[name] for name in path) <= 3000


DOORS = {
    "omegaconf": {"config"},
    "yaml": {"config"},
    "signal": {"preemption"},
    "faulthandler": {"preemption"},
    "ctypes": {"preemption", "state", "store"},  # store: a system call that Python lacks
    "blake3": {"store", "checkpoint", "saving"},
    "sklearn": {"tasks"},
    "PIL": {"tasks"},
    "safetensors": {"hf"},
    "torch.utils.tensorboard": {"monitoring"},
    "wandb": {"monitoring"},
    "torch.distributed": {"distributed"},
    "fsspec": {"store"},
    "s3fs": {"store"},
    "tenacity": {"retry"},
}


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library):
    for file, tree in TREES.items():
        through = {
            name
            for name in imported(tree, own=False)
            if name == library or name.startswith(f"{library}.")
        }
        attributes = {
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        through |= {name for name in attributes if "." in library and name.startswith(library)}
        assert not through or part_of(MODULES[file]) in DOORS[library], (
            f"{MODULES[file]} imports {through}"
        )


def test_only_the_declared_libraries_are_imported():
    declared = set(
        re.findall(r'^\s*"([a-z0-9-]+)>=', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    )
    allowed = declared | {"sklearn", "PIL", "yaml", "wandb"}
    found = {name.split(".")[0] for tree in TREES.values() for name in imported(tree, own=False)}
    assert found - set(sys.stdlib_module_names) <= allowed


@BY_NAME
def test_no_module_is_named_like_one_of_the_standard_library(file):
    if file.parent == HOUSE:  # torchrun puts this folder first on sys.path
        assert file.stem not in sys.stdlib_module_names - {"__main__"}


@BY_NAME
def test_modules_fit_in_the_head(file):
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) <= 300, f"{len(lines)} lines"


# Every keyword of these is the interface of a program's loop, and has its line in the docstring.
LONG = {"harness.run.init", "harness.run.api.batches"}
# The parameters of a task are the keys of `task.args`, which are stored in checkpoints.
MANY_PARAMETERS = LONG | {"harness.tasks.bytes.build"}


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, named after its module."""
    return [
        (f"{MODULES[file]}.{node.name}", node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_functions_fit_on_a_screen_with_their_docstrings():
    lengths = [(name, there(node.end_lineno) - node.lineno + 1) for name, node in functions()]
    assert {name: length for name, length in lengths if length > 50}.keys() == LONG


def test_functions_have_few_parameters():
    given = [
        (name, [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        for name, node in functions()
    ]
    counts = [
        (name, sum(parameter.arg not in ("self", "cls") for parameter in parameters))
        for name, parameters in given
    ]
    assert {name: count for name, count in counts if count > 8}.keys() == MANY_PARAMETERS


def test_no_file_name_stands_twice():
    """So that a name in a traceback or in an editor's list says which module it is."""
    names = [file.name for file in TREES if file.name not in ("__init__.py", "__main__.py")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_a_folder_has_few_modules():
    """But for the commands, which are one file each."""
    folders = [file.parent.name for file in FILES if file.parent != HOUSE / "cli"]
    assert {name: count for name in set(folders) if (count := folders.count(name)) > 14} == {}


@BY_NAME
def test_only_one_module_knows_which_rank_writes(file):
    # The latter decides who prints an error.
    if MODULES[file] in ("harness.distributed.ranks", "harness.errors"):
        return
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            ranks = [s for s in sides if ast.unparse(s).endswith(("rank", "rank()", "get_rank()"))]
            numbers = [s for s in sides if isinstance(s, ast.Constant) and s.value in (0, "0")]
            assert not (ranks and numbers), f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            assert not ast.unparse(node.operand).endswith("rank"), (
                f"line {node.lineno}: {ast.unparse(node)}"
            )


@BY_NAME
def test_nothing_is_caught_blindly(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}"
            silent = all(isinstance(part, ast.Pass) for part in node.body)
            assert not (silent and ast.unparse(node.type) in ("Exception", "BaseException")), (
                f"line {node.lineno}"
            )


@BY_NAME
def test_every_module_says_what_it_is_for(file):
    assert ast.get_docstring(TREES[file]) or file.stem in ("__main__",)


def test_every_file_of_the_commands_is_a_command():
    files = {
        file.stem.rstrip("_")
        for file in FILES
        if file.parent == HOUSE / "cli" and file.stem not in ("__init__", "locate")
    }
    assert files == set(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_shows_an_example_in_its_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"example: harness {command}" in capsys.readouterr().out


def test_the_program_shows_an_example_in_its_help(capsys):
    from harness import train

    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    assert "example: torchrun" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["nonsense"], ["status"], ["ls", "--nonsense", "x"]])
def test_a_wrong_command_line_ends_with_78(given, capsys):
    try:
        code: str | int | None = cli.main(given)
    except SystemExit as ended:
        code = ended.code
    assert code == 78
    assert "error" in capsys.readouterr().err


def test_the_package_is_the_one_of_this_checkout():
    assert Path(harness.__file__).parent == HOUSE


# Records that a function of the same folder fills in, and objects of torch's and Python's.
FILLED_IN = {
    *(
        "job",
        "known",
        "log",
        "made",
        "ordered",
        "double",
        "kept",
        "catalog",
        "whole",
        "resume_point",
        "source",
        "parser",
        "early",
    ),
    *(
        "ddp",
        "parameter",
        "shell",
        "part",
        "parts",
        "memo",
        "sys",
        "threading",
        "torch",
        "bits",
        "engine",
        "_engine",
        "twin",
        "timer",
        "alarm",
    ),
    *("within", "seen", "program_run", "traces", "_BaseDataLoaderIter", "Module"),
}
# Simple values, held by one object.
OWN_PARTS = ("self._kept", "self._hooks", "self._generators", "self._dealt", "self.fs", "self.head")


@BY_NAME
def test_no_object_is_completed_by_assigning_to_its_attributes_from_outside(file):
    """What an object needs it gets when it is made, or by a method that says what for."""
    stored = [
        node
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    ]
    for target in stored:
        owner = ast.unparse(target.value)
        first = there(re.match(r"\w+", owner))[0]
        assert owner in ("self", "cls") or owner.startswith(OWN_PARTS) or first in FILLED_IN, (
            f"{ast.unparse(target)} in line {target.lineno}"
        )


def test_no_test_imports_another():
    tests = REPO / "tests"
    for file in tests.rglob("*.py"):
        found = re.findall(r"^ *(?:from|import) (test_\w+)", file.read_text(), re.MULTILINE)
        assert not found, f"{file}: {found}"
    assert not [file for file in tests.glob("*.py") if file.name != "conftest.py"]
