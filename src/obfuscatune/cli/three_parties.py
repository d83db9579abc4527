"""`obfuscatune demo --three-parties`, shown on the terminal. What it does is in obfuscatune/demo/parties/."""

import json
from pathlib import Path

import typer

from obfuscatune.cli import output

EXIT_FAILED = 1


def show(out: Path, seed: int, profile: str | None, *, quick: bool, as_json: bool) -> None:
    """Play all scenes. Exit code 1 if anything did not hold.

    Raises:
        ConfigError: the extra `service` is not installed, an option cannot be used, or the folder is another's.
        ObfuscaTuneError: a step failed that should have worked.
    """
    from obfuscatune.demo.parties.machines import why_not_isolated
    from obfuscatune.demo.parties.page import render
    from obfuscatune.demo.parties.result import document
    from obfuscatune.demo.parties.run import PROFILES, PartiesSettings, run_parties
    from obfuscatune.demo.parties.terminal import TerminalScreen, print_result
    from obfuscatune.demo.settings import REPORT, RESULT, claim

    missing = why_not_isolated()
    settings = PartiesSettings(PROFILES if profile is None else (profile,), quick, seed, isolated=missing is None)
    folder = claim(out, PROFILES)
    output.notice(
        "A provider, a cloud and two owners, who need not trust each other. The enclave is an ordinary process here, "
        "and its evidence is SIMULATED: it proves nothing."
    )
    if missing is None:
        output.notice("Each machine has a network namespace of its own.")
    else:
        output.notice(f"No network namespaces ({missing}): all machines are on 127.0.0.1.")
    screen = TerminalScreen(output.stderr())
    with screen.shown():
        result = run_parties(settings, folder.root.resolve(), screen)
    found = document(result)
    folder.write_file(RESULT, json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
    folder.write_file(REPORT, render(result).encode())
    if as_json:
        output.write_json(found)
    else:
        print_result(result, out)
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)
