"""Where the demo writes: a folder of its own, made anew at each demo, and never one with anything else in it.

<out>/report.html         the page
<out>/result.json         the same in numbers
<out>/protected/adapter   the adapter in PEFT's format; beside it the run's files
<out>/plain/adapter
"""

from pathlib import Path

from obfuscatune.tuning.storage import RunDirectory
from obfuscatune.wire.errors import ConfigError, StorageError

MARK = ".obfuscatune-demo"
REPORT, RESULT = "report.html", "result.json"
SIDES = ("protected", "plain")


def claim(out: Path) -> RunDirectory:
    """Make the folder, or empty it of an earlier demo.

    Raises:
        ConfigError: it holds something, and no demo wrote it.
        StorageError: the disk refused.
    """
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: holds something else than a demo's files; choose another --out")
    folder = RunDirectory(out)
    folder.write_file(MARK, b"Written by `obfuscatune demo`, which replaces this folder's files.\n")
    for side in SIDES:
        if (out / side).exists():
            folder.remove_directory(side)
    for name in (REPORT, RESULT):
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{out / name}: the disk refused: {error.strerror or error}") from error
    return folder
