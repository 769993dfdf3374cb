import ast
import configparser
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
import yaml

import ulmrec_hf
from ulmrec_hf.trainer import ULMRecTrainingArguments, check_processes

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").rglob("*.yaml"))
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "peft",
    "trl",
    "evaluate",
    "sentence_transformers",
    "sklearn",
    "matplotlib",
}


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_importing_the_package_imports_nothing_heavy():
    loaded = python("import ulmrec_hf, sys; print(*sys.modules)").split()
    assert not HEAVY & set(loaded)
    assert "numpy" not in loaded


@pytest.mark.parametrize("name", ulmrec_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(ulmrec_hf, name) is not None


def test_the_face_shows_public_names_alone():
    assert dir(ulmrec_hf) == sorted(ulmrec_hf.__all__)
    assert 15 <= len(ulmrec_hf.__all__) <= 25


def test_importing_the_package_is_quick():
    """Without a clock: no module of another package than the standard library is loaded."""
    loaded = python(
        "import sys; before = set(sys.modules); import ulmrec_hf; print(*(set(sys.modules) - before))"
    ).split()
    assert {name.partition(".")[0] for name in loaded} == {"ulmrec_hf"}


SOURCES = sorted(path for name in ("ulmrec_hf", "recipes", "benchmarks") for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_parameter_lists_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(set(names) - {"self", "cls"})
            assert count <= 8, f"{node.name} has {count} parameters"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ulmrec_hf.Nothing  # noqa: B018


def test_the_shipped_accelerate_settings_are_all_there():
    names = {path.stem for path in ACCELERATE}
    assert names == {"cpu", "cpu_2", "single_gpu", "ddp"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_settings_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.num_processes == written["num_processes"] >= 1
    assert config.distributed_type.value == written["distributed_type"]


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_a_launcher_that_splits_the_model_is_refused_by_name(name, tmp_path, monkeypatch):
    args = ULMRecTrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="no", load_best_model_at_end=False)
    check_processes(args)
    with monkeypatch.context() as patch:  # what `accelerate launch` tells its processes
        patch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
        with pytest.raises(ValueError, match=rf"{name} would share one copy .* recipes/accelerate/ddp.yaml"):
            check_processes(args)
    setattr(args, name.lower(), "settings.json")  # what the command line tells the Trainer
    with pytest.raises(ValueError, match=name):
        check_processes(args)


def test_cpu_2_starts_two_processes_that_know_each_other(tmp_path):
    """Two launches at once, so that a fixed port would show."""
    script = tmp_path / "rank.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "from accelerate.utils import gather_object\n"
        "state = PartialState(cpu=True)\n"
        "print(gather_object([state.process_index]))\n"
        "state.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "recipes" / "accelerate" / "cpu_2.yaml"), str(script)]
    launches = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for launch in launches:
        output, _ = launch.communicate(timeout=180)
        assert output.count("[0, 1]") == 2  # the two may share a line


def requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_are_exact_and_name_no_build():
    constraints = requirements()
    assert constraints["torch"] == "2.13.0"
    assert not any("+" in number or name.startswith("nvidia") for name, number in constraints.items())


def test_every_dependency_is_constrained():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    wanted = config["options"]["install_requires"] + extras["test"] + extras["offline"]
    names = {line.split(">")[0].split("=")[0].strip() for line in wanted.splitlines()} - {""}
    known = {name.replace("_", "-") for name in requirements()}
    assert {name.replace("_", "-") for name in names} <= known


def test_readme_commands_are_taken_from_console_blocks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "```console\n$ first \\\n    --flag\noutput\n$ second\n```\n"
        "```bash\n$ never\n```\n"
        "```console results\n$ takes hours\n```\n"
    )
    command = [sys.executable, ROOT / ".ci" / "readme.py", readme]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    parsed = subprocess.run([*command, "--results"], capture_output=True, text=True, check=True)
    assert run.stdout == "first \\\n    --flag\nsecond\n"
    assert parsed.stdout == "takes hours\n"
    readme.write_text("```console\nno command\n```\n")
    assert "README.md line 1" in subprocess.run(command, capture_output=True, text=True).stderr


def test_imports_only_go_down():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_no_imports_run_in_a_circle():
    """Between files, those for type checkers counted."""
    graph = grimp.build_graph("ulmrec_hf", cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while leaves := {module for module, others in imported.items() if not others}:
        imported = {module: others - leaves for module, others in imported.items() if module not in leaves}
    assert not imported, f"in a circle, or above one: {sorted(imported)}"


def test_the_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert len(text.splitlines()) > 190
