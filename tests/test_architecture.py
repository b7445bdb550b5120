"""The house keeps its shape: imports point one way, and what README and scripts name exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sclong_ds", "kernels", "data_prep")
FLOORS = {
    "sclong_ds": [
        {"files", "progress", "command_line", "page"},
        {"config", "remote", "annotations"},
        {"corpus", "run_folder", "engine", "sweep"},
        {"loader", "model", "checkpoint", "recorders", "datasheet"},
        {"tracking"},
        {"objective", "exported", "job"},
        {"hub"},
        {"planning", "embedding", "released", "report"},
        {"training", "evaluation", "gene_analysis", "input_checks"},
        {"finetune", "perturb_bench"},
        {"pretrain", "demo", "__main__", "restarts", "preflight", "mlflow_model"},
        {"completion"},
    ],
    "data_prep": [
        {"source", "ledger", "arguments"},
        {"annotations", "passes"},
        {"counts", "readers", "corpus", "graph", "report"},
        {"genes"},
        {"manifest"},
        {"staging", "fetch"},
        {"convert"},
        {"verify"},
        {"__main__"},
    ],
}
"""Packages by floor; a package imports from lower floors only."""
DATA_PREP_MAY_USE = {
    "files", "remote", "progress", "command_line", "page", "annotations", "corpus", "datasheet",
}  # fmt: skip
"""Packages of sclong_ds: the formats on disk, and what every command needs."""
PLACES = {
    "torch": {
        "sclong_ds.engine", "sclong_ds.model", "sclong_ds.checkpoint", "sclong_ds.objective",
        "sclong_ds.exported", "sclong_ds.hub", "sclong_ds.job", "sclong_ds.embedding",
        "sclong_ds.released",
        "sclong_ds.evaluation", "sclong_ds.gene_analysis", "sclong_ds.training",
        "sclong_ds.finetune", "sclong_ds.perturb_bench", "sclong_ds.pretrain", "sclong_ds.demo",
        "kernels",
    },
    "triton": {"kernels"},
    "torch_geometric": {"sclong_ds.model"},
    "deepspeed": {"sclong_ds.engine", "sclong_ds.checkpoint"},
    "mlflow": {"sclong_ds.tracking", "sclong_ds.embedding"},
    "tensorboard": {"sclong_ds.recorders"},
    "wandb": {"sclong_ds.recorders"},
    "matplotlib": {
        "sclong_ds.report", "sclong_ds.evaluation", "sclong_ds.finetune", "data_prep.graph",
        "data_prep.report",
    },
    "tqdm": {"sclong_ds.progress"},
    "jinja2": {"sclong_ds.page"},
    "kernels": {"sclong_ds.model", "sclong_ds.training"},
    "data_prep": {
        "sclong_ds.embedding", "sclong_ds.evaluation", "sclong_ds.gene_analysis",
        "sclong_ds.__main__", "sclong_ds.demo", "sclong_ds.completion",
    },
}  # fmt: skip
"""The only packages that import a library, or another top-level package."""


EACH_HAS = {"main", "run", "add_arguments", "tell", "open_format"}
"""A command is a module with the first three, a reader one with the last two; they are found by
the module's name."""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if "resources" in path.parts:
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = modules()
IMPORTS = {name: imports(path) for name, path in MODULES.items()}
IMPORTS["sclong_ds"] = {"importlib", "typing"}
"""What the public package names for type checkers is imported on first use
(tests/sclong_ds/test_public_names.py)."""


def ours(name: str) -> set[str]:
    return {i for i in IMPORTS[name] if i in MODULES and i not in PACKAGES}


def tops(name: str) -> set[str]:
    return {i.split(".")[0] for i in IMPORTS[name]}


def test_the_page_about_the_house_has_every_package():
    page = (ROOT / "docs" / "explain" / "house.md").read_text()
    (tree,) = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    packages = {
        path.parent.relative_to(ROOT)
        for name in PACKAGES
        for path in (ROOT / name).glob("*/__init__.py")
    }
    assert packages
    # On the line of its floor, whole or after the one beside it: `a/b/` or `c/`.
    missing = [
        str(package)
        for package in sorted(packages)
        if not re.search(
            rf"^{package}/|^{package.parent}/.*[ ;]{package.name}/", tree, re.MULTILINE
        )
    ]
    assert not missing
    named = re.findall(r"^((?:sclong_ds|data_prep)/\w+)/", tree, re.MULTILINE)
    assert not [name for name in named if not (ROOT / name / "__init__.py").exists()]


def test_kernels_import_torch_and_triton_only():
    allowed = {"kernels", "torch", "triton", *sys.stdlib_module_names}
    for name in MODULES:
        if name.split(".")[0] == "kernels":
            assert tops(name) <= allowed, name


def package(name: str) -> str:
    """Return the package of a module: `sclong_ds.corpus` of `sclong_ds.corpus.shards`."""
    top, _, rest = name.partition(".")
    return f"{top}.{rest.partition('.')[0]}" if top in FLOORS and rest else top


def test_every_package_has_a_floor():
    for top, floors in FLOORS.items():
        named = [room for floor in floors for room in floor]
        assert len(named) == len(set(named))
        found = {package(name) for name in MODULES if name.startswith(f"{top}.")}
        assert found == {f"{top}.{room}" for room in named}


def test_packages_import_lower_floors_only():
    floor_of = {
        f"{top}.{room}": number
        for top, floors in FLOORS.items()
        for number, floor in enumerate(floors)
        for room in floor
    }
    for name in MODULES:
        own = package(name)
        for other in {package(i) for i in ours(name)} - {own}:
            if other.split(".")[0] == own.split(".")[0] and own in floor_of:
                assert floor_of[other] < floor_of[own], f"{name} imports {other}"


def test_data_prep_imports_the_formats_and_what_commands_need():
    allowed = {f"sclong_ds.{room}" for room in DATA_PREP_MAY_USE}
    for name in MODULES:
        if name.startswith("data_prep"):
            used = {package(i) for i in ours(name) if i.startswith("sclong_ds")}
            assert used <= allowed, name


@pytest.mark.parametrize("library", PLACES)
def test_library_is_imported_in_its_place_only(library):
    found = {package(name) for name in MODULES if library in tops(name)}
    assert {room for room in found if room.split(".")[0] != library} <= PLACES[library]


def test_packages_stay_small():
    for folder in {path.parent for path in MODULES.values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 10, f"{folder} has {len(files)} files"


def test_every_file_has_a_test_of_its_name_or_is_named_by_the_test_that_covers_it():
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    mirrored = {
        path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_"))
        for path in tests
    }
    named = set()
    for text in tests.values():
        cited = re.findall(
            r"`((?:sclong_ds|kernels|data_prep)/[\w/]+\.py)`",
            ast.get_docstring(ast.parse(text)) or "",
        )
        named |= {Path(name) for name in cited}
    files = {
        path.relative_to(ROOT)
        for path in MODULES.values()
        if not path.name.startswith("__") and path.parent.name != "resources"
    }
    assert not sorted(map(str, files - mirrored - named))
    assert not sorted(str(name) for name in named if not (ROOT / name).exists())


def test_no_name_is_defined_twice_in_a_package():
    found: dict[tuple[str, str], str] = {}
    for name, path in MODULES.items():
        if name.count(".") < 2:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in EACH_HAS:
                other = found.setdefault((package(name), node.name), name)
                assert other == name, f"{node.name} is defined in {other} and in {name}"


def test_nothing_imports_pretrain():
    assert not [name for name in MODULES if "sclong_ds.pretrain" in IMPORTS[name]]


def test_no_cycles():
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        if state.get(name) == 2:
            return
        assert state.get(name) != 1, f"import cycle: {' -> '.join([*trail, name])}"
        state[name] = 1
        for other in sorted(ours(name) - {name}):
            visit(other, [*trail, name])
        state[name] = 2

    for name in MODULES:
        visit(name, [])


def test_files_and_functions_stay_small():
    beside = [p for name in ("tests", "benchmarks", "docs") for p in (ROOT / name).rglob("*.py")]
    for path in [*MODULES.values(), *(p for p in beside if "golden" not in p.parts)]:
        text, folder = path.read_text(), path.relative_to(ROOT).parts[0]
        assert text.count("\n") <= 500, f"{path}: more than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if folder == "kernels" or node.name in ("main", "train") else 60
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= limit, f"{path}: {node.name} has {length} lines"


def documents() -> list[Path]:
    pages = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
    return [ROOT / "README.md", *pages, *sorted((ROOT / "slurm").glob("*.sh"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_named_paths_modules_and_targets_exist(path):
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert target in targets, f"{path.name} names `make {target}`"
    for module in re.findall(r"(?:-m|--module) ((?:sclong_ds|data_prep|benchmarks)[\w.]*)", text):
        place = ROOT / module.replace(".", "/")
        runs = place.with_suffix(".py").exists() or (place / "__main__.py").exists()
        assert module in MODULES or runs, module
    folders = "sclong_ds|kernels|data_prep|ds_configs|slurm|tests|benchmarks"
    for named in re.findall(rf"(?<![\w/.$\"{{}}])((?:{folders})/[\w./-]*\w)", text):
        assert (ROOT / named).exists(), f"{path.name} names {named}"


def test_the_places_to_touch_hold_what_contributing_names_in_them():
    rows = re.findall(r"^\| an? .*", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) >= 7
    for row in rows:
        named = [ROOT / path for path in re.findall(r"`([a-z_]+/[\w./-]+)`", row)]
        folders = {path if path.is_dir() else path.parent for path in named}
        text = "\n".join(file.read_text() for folder in folders for file in folder.glob("*.py"))
        for name in re.findall(r"`([A-Z][A-Z_]+|[a-z]+_[a-z_]+)`", row):
            assert re.search(rf"\b{name}\b", text), f"{name} is in none of {row[:40]}"


def test_named_commands_are_commands():
    from data_prep.__main__ import parser
    from sclong_ds.__main__ import COMMANDS

    known = {"sclong_ds": set(COMMANDS), "data_prep": set(subcommands(parser([])))}
    for path in documents():
        for package, command in re.findall(
            r"-m (sclong_ds|data_prep) ([a-z][a-z-]+)", path.read_text()
        ):
            assert command in known[package], f"{path.name} names `python -m {package} {command}`"


HELP = """
import sys
from data_prep.__main__ import COMMANDS as PREPARE, parser as prepare
from sclong_ds.__main__ import COMMANDS, parser
for name in COMMANDS:
    parser([name])
for name in PREPARE:
    prepare([name])
slow = {"torch", "deepspeed", "matplotlib", "mlflow", "pandas", "anndata", "h5py", "sklearn",
        "numba", "goatools", "scipy", "zarr"}
print(*sorted(slow & set(sys.modules)))
"""
MODULE = """
import contextlib, io, runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    runpy.run_module(module, run_name="__main__", alter_sys=True)
assert text.getvalue(), "no output"
print(*sorted({"torch", "deepspeed", "matplotlib", "mlflow"} & set(sys.modules)))
"""


def test_help_waits_for_no_library_that_a_command_works_with():
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "command",
    [
        "sclong_ds.pretrain --help",
        "sclong_ds.demo --help",
        "sclong_ds.job.restarts --help",
        "sclong_ds.job.preflight --help",
        "sclong_ds.restarts --help",
        "sclong_ds.preflight --help",
        "sclong_ds plan --config sclong_tiny --nodes 1 --gpus-per-node 2",
    ],
)
def test_programs_answer_without_torch_and_deepspeed(command):
    done = subprocess.run(
        [sys.executable, "-c", MODULE, *command.split()],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


def test_the_parent_of_the_workers_of_convert_needs_no_reader():
    program = (
        "import sys, data_prep.convert.command\n"
        "slow = {'numpy', 'scipy', 'pandas', 'h5py', 'zarr', 'pyarrow', 'tqdm'}\n"
        "print(*sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_folders_are_listed_by_what_says_that_it_cannot():
    """Path.glob takes a folder that may not be read for an empty one, and checksums with it."""
    checked = ("data_prep", "sclong_ds/corpus", "sclong_ds/checkpoint", "sclong_ds/files")
    files = [path for folder in checked for path in (ROOT / folder).rglob("*.py")]
    found = [str(path) for path in files if re.search(r"\.r?glob\(", path.read_text())]
    assert not found, "use listed or files_below of sclong_ds.files.atomic"


def test_few_functions_take_the_whole_configuration():
    """A part is handed the section that it reads."""
    takers = [
        f"{name}.{node.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None and "RunConfig" in ast.unparse(argument.annotation)
    ]
    assert len(takers) <= 8, takers


PLAINER = {
    r"for people": "human-readable",
    r"anew": "again",
    r"of no effect": "ignored",
    r"but for": "except",
    r"go(?:es)? on|going on|gone on": "continue",
    r"whole or absent": "atomic",
    r"(?<!\")life(?!\")|lives": "start, or a verb of what is meant",
    r"(?:log|message|warning) says": "states, names, gives",
}
"""Expression to what is written instead; `"life"` is a key of written files."""


def lines_with(expression: str, text: str) -> list[int]:
    """Return the lines where an expression begins; its words may be on two lines."""
    words = expression.replace(" ", r"[\s#\"]+")
    pattern = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    return [text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text)]


@pytest.mark.parametrize("expression", PLAINER)
def test_words_of_the_field_are_used(expression):
    folders = (*PACKAGES, "benchmarks", "docs", "slurm", "tests")
    files = [p for name in folders for p in (ROOT / name).rglob("*")]
    files += [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
    ]
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if path.suffix in (".py", ".sh", ".md", ".toml", "") and path.is_file()
        if not {"golden", "resources"} & set(path.parts) and path != Path(__file__)
        for line in lines_with(expression, path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not places, f"write: {PLAINER[expression]}"


def test_words_are_found_over_the_end_of_a_line_and_as_words_alone():
    assert lines_with("but for", "all\n    # but\n    # for one; a rebut form") == [2]
    kept = 'row["life"], livestock, lifetime'
    assert lines_with(r"(?<!\")life(?!\")|lives", f"{kept}\nits life") == [2]


def subcommands(parser) -> list[str]:
    return [
        name
        for action in parser._actions
        if hasattr(action, "choices") and isinstance(action.choices, dict)
        for name in action.choices
    ]


def shown_commands() -> list[list[str]]:
    """Return the commands of the shell blocks of README.md and docs/, split into words."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [
        shlex.split(line, comments=True)
        for block in blocks
        for line in block.splitlines()
        if line.strip()
    ]


def arguments_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the program that a shown command runs in the end, and its arguments."""
    scripts = {
        "slurm/data_prep.sh": ("data_prep", []),
        "slurm/gene_graph.sh": ("data_prep", ["gene-graph"]),
        "slurm/embed.sh": ("sclong_ds", ["embed"]),
        "slurm/pretrain.sh": ("pretrain", []),
    }
    for i, word in enumerate(words):
        if word in scripts:
            program, first = scripts[word]
            return program, first + words[i + 1 :]
        if word in ("-m", "--module"):
            return words[i + 1].replace("sclong_ds.pretrain", "pretrain"), words[i + 2 :]
    return None


def test_readme_commands_are_accepted():
    """Every command that the README shows passes the real argument parser, overrides included."""
    from data_prep.__main__ import parser as data_prep_parser
    from sclong_ds.__main__ import parser as sclong_parser
    from sclong_ds.config.load import load_config

    found = [a for a in map(arguments_of, shown_commands()) if a]
    assert len(found) >= 12
    for program, words in found:
        if program == "data_prep":
            data_prep_parser(words).parse_args(words)
        elif program == "sclong_ds":
            sclong_parser(words).parse_args(words)
        else:
            words = words[2:] if words[0] == "--sweep" else words
            assert words[0] == "--config"
            load_config(words[1], [w.replace("...", "x") for w in words[2:]])


def test_readme_is_filled_in():
    assert not re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text())
