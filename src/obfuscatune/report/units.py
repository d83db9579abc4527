"""Numbers as people read them. Decimal prefixes: 1 kB is 1000 bytes."""


def format_bytes(count: float) -> str:
    """`1.23 MB`: three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} TB"


def format_count(count: int) -> str:
    """`1,557,611,200`."""
    return f"{count:,}"


def format_share(share: float) -> str:
    """`5.3 %` of a share between 0 and 1."""
    return f"{100 * share:.1f} %"


def format_seconds(seconds: float) -> str:
    """`4.2 s` or `1 min 32 s`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def format_small(value: float) -> str:
    """A difference: `0` where it is exactly that, else `1.2e-06`."""
    return "0" if value == 0 else f"{value:.1e}"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
