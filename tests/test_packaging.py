"""What is installed is what is here: the wheel and the sdist hold every module, and importing aerogel costs nothing."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import aerogel

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = {"tests", "benchmarks", "docs", "src", "build", "dist", "demo"}
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir() and path.name[0].isalpha() and path.name not in NOT_INSTALLED)
SETUP = ROOT / "setup.py"
MODULES = sorted(
    [*(file for file in ROOT.glob("*.py") if file != SETUP), *(file for folder in FOLDERS for file in folder.rglob("*.py"))]
)
DATA = sorted(
    [
        *(ROOT / "recipes").glob("*.yaml"),
        *(ROOT / "eval").glob("*.j2"),
        *(ROOT / "kernels" / "cuda").glob("*.cu*"),
        *(ROOT / "kernels" / "gemm").glob("*.json"),
        ROOT / "py.typed",
    ]
)
NATIVE = sorted([*(ROOT / "kernels" / "native").glob("*.cpp"), *(ROOT / "kernels" / "native").glob("*.h")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def inside(file: Path) -> str:
    """The path of a source file inside the installed package: `aerogel/cli/app.py`."""
    return f"aerogel/{file.relative_to(ROOT).as_posix()}"


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built without a network from a clean copy of the source tree."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for file in (*MODULES, *DATA, *NATIVE, SETUP, *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (copy / "src").mkdir()
    (copy / "src" / "aerogel").symlink_to("..", target_is_directory=True)
    # Compiling takes a minute and is tested by everything that runs the kernels.
    run(
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(out),
        ".",
        cwd=copy,
        AEROGEL_NATIVE="0",
    )
    run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=copy)
    return out


def test_the_list_of_packages_is_the_list_of_folders() -> None:
    folders = {ROOT, *(file.parent for file in MODULES)}
    names = {".".join(["aerogel", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_kernels_is_no_ordinary_package() -> None:
    """With an __init__.py, `import transformers` from the repository root takes kernels/ for the library of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in {file.parent for file in MODULES}:
        if ROOT / "kernels" not in (folder, *folder.parents):
            assert (folder / "__init__.py").is_file(), f"{folder.name} has no __init__.py"


def test_nothing_at_the_root_gets_in_the_way() -> None:
    assert not (ROOT / "conftest.py").exists()
    for name in ("datasets", "tokenizers", "evaluate", "transformers"):
        assert not (ROOT / name).exists()
    assert (ROOT / "src" / "aerogel").readlink() == Path("..")


def test_the_wheel_holds_every_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {inside(file) for file in (*MODULES, *DATA)}


def test_the_sdist_holds_every_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{inside(file)}" for file in (*MODULES, *DATA, *NATIVE)} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_every_module_imports_from_the_installed_wheel_and_touches_no_cuda(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "site"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(place), str(wheel), cwd=tmp_path)
    names = [".".join(Path(inside(file)).with_suffix("").parts).removesuffix(".__init__") for file in MODULES]
    code = (
        "import importlib, aerogel\n"
        f"assert aerogel.__file__.startswith({str(place)!r}), aerogel.__file__\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from aerogel.recipes.schema import shipped\n"
        f"assert len(shipped()) == {len([file for file in DATA if file.suffix == '.yaml'])}\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized(), 'a module touches CUDA when it is imported'\n"
    )
    run("-c", code, cwd=tmp_path, PYTHONPATH=str(place))


def test_importing_aerogel_costs_nothing() -> None:
    heavy = {"lm_eval", "datasets", "triton", "typer", "rich", "torch", "transformers", "numpy", "pydantic", "matplotlib"}
    code = f"import sys, aerogel; print(sorted({heavy!r} & set(sys.modules)))"
    assert run("-c", code, cwd=ROOT, PYTHONPATH=str(ROOT / "src")).strip() == "[]"


def test_the_public_names() -> None:
    assert sorted(aerogel.__all__) == ["benchmark", "compress", "evaluate", "load", "plan"]
    for name in aerogel.__all__:
        assert inspect.getdoc(getattr(aerogel, name)), f"aerogel.{name} has no docstring"
    with pytest.raises(AttributeError, match="compress"):
        aerogel.compres  # noqa: B018


def test_only_the_command_line_prints_and_draws() -> None:
    for file in MODULES:
        if file.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "eval", "exec"), f"{name} calls {node.func.id}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {module.partition(".")[0] for module in modules} & {"typer", "rich"}, f"{name} imports from cli's"


def test_imports_are_absolute() -> None:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.relative_to(ROOT)}:{node.lineno} is a relative import"


def test_everything_public_is_documented() -> None:
    bare = []
    for file in MODULES:
        tree = ast.parse(file.read_text("utf-8"))
        if file.name != "__init__.py" and not ast.get_docstring(tree):
            bare.append(f"{file.relative_to(ROOT)}: the module")
        for node in tree.body:
            public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            bare += [
                f"{file.relative_to(ROOT)}:{member.lineno}: {member.name}"
                for member in [node, *(getattr(node, "body", []) if public else [])]
                if isinstance(member, ast.FunctionDef | ast.ClassDef)
                and not member.name.startswith("_")
                and not ast.get_docstring(member)
                and "overload" not in {getattr(item, "id", "") for item in member.decorator_list}
            ]
    assert not bare, "no docstring: " + ", ".join(bare)


def test_constraints_fit_the_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow the tested {pin}"
