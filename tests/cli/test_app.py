"""Commands are found without being imported, and every end has its exit code and its one line."""

import os
import re
import subprocess
import sys
import time

import pytest

from obfuscatune import errors
from obfuscatune.cli import app, evaluate, finetune
from obfuscatune.process import SPIN_COUNT

COMMANDS = list(app._COMMANDS)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_help_names_every_command_and_imports_none(obfuscatune):
    code = (
        "import sys; from obfuscatune.cli.app import run; code = run(['--help']); "
        "heavy = {'torch', 'transformers', 'peft', 'pydantic', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    began = time.perf_counter()
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - began < 5, "it takes 0.2 s on an idle machine"
    for name in COMMANDS:
        assert re.search(rf"│ {name} ", result.stdout)


def test_the_worker_never_loads_transformers():
    code = (
        "import sys; from obfuscatune.cli.app import run; run(['worker', '--help']); import obfuscatune.worker.server; "
        "heavy = {m for m in sys.modules if m.split('.')[0] in ('transformers', 'peft') or '.enclave' in m}; "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(obfuscatune, name):
    ran = obfuscatune(name, "--help")
    assert ran.code == 0
    assert "Usage: obfuscatune " + name in ran.stdout
    assert ran.stderr == ""


GROUPS = {"bench", "fleet", "provider", "owner"}
"""Each of their own commands has an example."""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in GROUPS])
def test_examples_begin_with_their_command(obfuscatune, name):
    assert f"Example: obfuscatune {name}" in obfuscatune(name, "--help").stdout


def test_every_option_is_described(obfuscatune):
    for module in (finetune, evaluate):
        text = obfuscatune(module.__name__.rsplit(".", 1)[1], "--help").stdout
        for line in text.splitlines():
            if match := re.match(r"│ (\*  )?--\S+\s+<\S+>\s*│?$", line):
                pytest.fail(f"no description: {match.group()}")


def test_defaults_look_alike_and_paragraphs_fill_their_lines(obfuscatune):
    text = obfuscatune("bench", "step", "--help").stdout + obfuscatune("demo", "--help").stdout
    assert "[default: 7]" in text
    assert "[default: all cores]" in text
    assert "[default: (" not in text
    assert "fine-tunes it with LoRA on their notes" in text  # broken between "their" and "notes" in the docstring


def test_version(obfuscatune):
    ran = obfuscatune("--version")
    assert ran.code == 0
    assert re.fullmatch(r"obfuscatune \d\S*\n", ran.stdout)


def test_python_dash_m():
    result = subprocess.run(
        [sys.executable, "-m", "obfuscatune", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("obfuscatune ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetunes"], "No such command 'finetunes'"),
        (["help"], "--help says what there is"),
        (["finetune", "--lora-size", "3"], "No such option: --lora-size"),
        (["finetune", "--lora-r", "three"], "Invalid value for '--lora-r'"),
        (["finetune", "extra"], "unexpected extra argument"),
        (["finetune"], "data is missing: give --data"),
        (["worker"], "Missing option '--listen'"),
        (["evaluate"], "give --task with --data-dir, or --data alone"),
        (["evaluate", "--task", "sciq"], "give --task with --data-dir, or --data alone"),
        (["evaluate", "--data", "x", "--limit", "0"], "--limit: expected at least 1, found 0"),
        (["evaluate", "--plain", "--compare-plain"], "give one of them"),
        (["generate"], "give --prompt or --prompt-file, one of them"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "give --prompt or --prompt-file, one of them"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "--temperature: expected 0 or more"),
        (["generate", "--prompt", "a", "--top-p", "0"], "--top-p: expected more than 0"),
        (["generate", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: expected at least 1"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(obfuscatune, arguments, message):
    ran = obfuscatune(*arguments)
    assert ran.code == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert message in ran.stderr


def test_no_arguments_is_help_and_code_2(obfuscatune):
    ran = obfuscatune()
    assert ran.code == 2
    assert "Commands" in ran.stdout
    assert ran.stderr == ""


ERRORS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ObfuscaTuneError)
]
"""Those that have a place in the tree; not what other tests have imported that is handled where it is raised."""


@pytest.fixture
def failing(monkeypatch):
    """Makes `finetune` fail with an error."""

    def fail_with(error: BaseException) -> None:
        def command() -> None:
            raise error

        monkeypatch.setattr(finetune, "finetune", command)

    return fail_with


@pytest.mark.parametrize("kind", ERRORS)
def test_each_of_our_errors_is_one_line_and_its_code(obfuscatune, failing, kind):
    failing(kind("what was wrong\nand what to do"))
    ran = obfuscatune("finetune")
    assert ran.stderr == "error: what was wrong and what to do\n"
    assert ran.code == (2 if kind is errors.ConfigError else 1)


def test_an_unexpected_error_is_one_line_that_says_so(obfuscatune, failing):
    failing(ZeroDivisionError("division by zero"))
    ran = obfuscatune("finetune")
    assert (
        ran.stderr == "error: unexpected ZeroDivisionError: division by zero (a fault of ours; --debug shows where)\n"
    )
    assert ran.code == 1


@pytest.mark.parametrize("way", ["option", "variable"])
@pytest.mark.parametrize("error", [errors.DataError("x"), ZeroDivisionError("x")])
def test_a_traceback_only_for_debugging(obfuscatune, failing, monkeypatch, way, error):
    failing(error)
    if way == "variable":
        monkeypatch.setenv("OBFUSCATUNE_DEBUG", "1")
    ran = obfuscatune("finetune", *(["--debug"] if way == "option" else []))
    assert "Traceback (most recent call last)" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("error: ")
    monkeypatch.setenv("OBFUSCATUNE_DEBUG", "0")
    assert "Traceback" not in obfuscatune("finetune").stderr


def test_an_interruption_is_one_word_and_130(obfuscatune, failing):
    failing(KeyboardInterrupt())
    ran = obfuscatune("finetune")
    assert (ran.code, ran.stderr) == (130, "interrupted\n")


def test_threads_spin_briefly_while_they_wait_unless_told_otherwise():
    show = "import os; from obfuscatune.cli.app import run; run(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for told, expected in ({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"):
        shown = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=env | told, check=True)
        assert shown.stdout.split()[-1] == expected


def test_a_reader_that_goes_away_is_no_error():
    code = "from obfuscatune.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(60)


@pytest.mark.parametrize("module", ["OpenSSL", "uvicorn"])
def test_a_package_of_the_extra_that_is_missing_is_named_with_the_remedy(module, tmp_path):
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from obfuscatune.cli.app import run\n"
        "sys.exit(run(['owner', 'proxy', '--enclave', 'x:1', '--policy', 'p', '--identity', 'i']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f'error: {module} is not installed, which this takes: pip install "obfuscatune[service]"'
    )
