"""The house keeps its shape: imports point one way, and what README and scripts name exists."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sclong_ds", "kernels", "data_prep")
STORAGE = {
    "sclong_ds.corpus.genes",
    "sclong_ds.corpus.catalogue",
    "sclong_ds.corpus.corpus",
    "sclong_ds.corpus.cell_store",
    "sclong_ds.corpus.cell_writer",
    "sclong_ds.corpus.location",
    "sclong_ds.corpus.shards",
    "sclong_ds.corpus.byte_code",
    "sclong_ds.corpus.gene_graph",
    "sclong_ds.files.atomic",
    "sclong_ds.files.checksums",
    "sclong_ds.files.obs_table",
    "sclong_ds.files.npz",
}
"""The on-disk formats: no torch, shared by data preparation and training."""
LOADER = {
    "sclong_ds.loader.loader",
    "sclong_ds.loader.batches",
    "sclong_ds.loader.pool",
    "sclong_ds.loader.threads",
    "sclong_ds.loader.order",
}
"""The loader: no torch either, so that it can be used, and timed, without."""
CONFIG = {
    "sclong_ds.config.load",
    "sclong_ds.config.history",
    "sclong_ds.config.rules",
    "sclong_ds.config.sections",
}
HEAVY = {"torch", "deepspeed", "triton", "torch_geometric", "mlflow"}


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


def ours(name: str) -> set[str]:
    return {i for i in IMPORTS[name] if i in MODULES and i not in PACKAGES}


def tops(name: str) -> set[str]:
    return {i.split(".")[0] for i in IMPORTS[name]}


def test_kernels_import_torch_and_triton_only():
    allowed = {"kernels", "torch", "triton", *sys.stdlib_module_names}
    for name in MODULES:
        if name.split(".")[0] == "kernels":
            assert tops(name) <= allowed, name


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("data", STORAGE | LOADER),
        ("masking", {"sclong_ds.config.load"}),
        (
            "objective",
            {
                "sclong_ds.objective.batch",
                "sclong_ds.objective.targets",
                "sclong_ds.corpus.byte_code",
            },
        ),
        ("device_batch", STORAGE),
        ("metrics", {"sclong_ds.model.routing"}),
        ("guards", set()),
        ("watchdog", set()),
        ("engine", {"sclong_ds.config.load"}),
        ("run_folder", {"sclong_ds.files.json_lines", "sclong_ds.files.sealed_json"}),
        ("plots", set()),
        (
            "tracking",
            {
                "sclong_ds.config.load",
                "sclong_ds.tracking.sender",
                "sclong_ds.run_folder.pending_pictures",
                "sclong_ds.run_folder.files",
                "sclong_ds.config.strict_yaml",
                "sclong_ds.tracking.node_sampler",
            },
        ),
        ("mlflow_store", {"sclong_ds.files.json_lines", "sclong_ds.run_folder.files"}),
        ("system_metrics", {"sclong_ds.files.json_lines", "sclong_ds.run_folder.files"}),
        ("gradient_norms", set()),
        (
            "rank_times",
            {"sclong_ds.engine.deepspeed_engine", "sclong_ds.run_folder.pending_pictures"},
        ),
    ],
)
def test_parts_of_training_know_only_what_they_need(name, allowed):
    modules = {i if i in MODULES else i.rpartition(".")[0] for i in ours(f"sclong_ds.{name}")}
    assert modules <= allowed, name


def test_storage_and_loader_need_no_torch():
    for allowed in (STORAGE, STORAGE | LOADER):
        for name in allowed:
            assert not tops(name) & (HEAVY | {"kernels", "data_prep"}), name
            assert ours(name) <= allowed, name


def test_data_prep_imports_only_the_storage_modules():
    for name in MODULES:
        if name.split(".")[0] == "data_prep":
            assert {i for i in ours(name) if i.startswith("sclong_ds")} <= STORAGE, name
            assert not tops(name) & HEAVY, name


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        (
            "deepspeed",
            {
                "sclong_ds.engine.deepspeed_engine",
                "sclong_ds.checkpoint.save",
                "sclong_ds.checkpoint.writer",
                "sclong_ds.checkpoint.torch_files",
            },
        ),
        ("mlflow", {"sclong_ds.tracking.sender", "sclong_ds.embedding.mlflow_model"}),
    ],
)
def test_library_is_imported_in_its_place_only(library, allowed):
    assert {name for name in MODULES if library in tops(name)} <= allowed


def test_model_imports():
    allowed = STORAGE | {"sclong_ds.config.load", "kernels.favor_attention", "kernels.reference"}
    for name in MODULES:
        if name.startswith("sclong_ds.model."):
            assert {i for i in ours(name) if not i.startswith("sclong_ds.model")} <= allowed, name


def test_config_imports_the_yaml_reader_only():
    for name in CONFIG:
        assert ours(name) <= CONFIG | {"sclong_ds.config.strict_yaml"}, name
    assert not ours("sclong_ds.config.strict_yaml")


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
    for name, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path}: more than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if name.startswith("kernels") or node.name in ("main", "train") else 60
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= limit, f"{path}: {node.name} has {length} lines"


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "slurm").glob("*.sh"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_named_paths_modules_and_targets_exist(path):
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert target in targets, f"{path.name} names `make {target}`"
    for module in re.findall(r"(?:-m|--module) ((?:sclong_ds|data_prep|benchmarks)[\w.]*)", text):
        assert module in MODULES or (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), (
            module
        )
    folders = "sclong_ds|kernels|data_prep|ds_configs|slurm|tests|benchmarks"
    for named in re.findall(rf"(?<![\w/.$\"{{}}])((?:{folders})/[\w./-]*\w)", text):
        assert (ROOT / named).exists(), f"{path.name} names {named}"


def test_named_commands_are_commands():
    from data_prep.__main__ import _parser
    from sclong_ds.__main__ import COMMANDS

    known = {"sclong_ds": set(COMMANDS), "data_prep": set(subcommands(_parser([])))}
    for path in documents():
        for package, command in re.findall(
            r"-m (sclong_ds|data_prep) ([a-z][a-z-]+)", path.read_text()
        ):
            assert command in known[package], f"{path.name} names `python -m {package} {command}`"


def subcommands(parser) -> list[str]:
    return [
        name
        for action in parser._actions
        if hasattr(action, "choices") and isinstance(action.choices, dict)
        for name in action.choices
    ]


def shown_commands() -> list[list[str]]:
    """Return the commands of README.md's shell blocks, split into words."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
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
    from data_prep.__main__ import _parser as data_prep_parser
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
            assert words[0] == "--config"
            load_config(words[1], [w.replace("...", "x") for w in words[2:]])


def test_readme_is_filled_in():
    assert not re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text())
