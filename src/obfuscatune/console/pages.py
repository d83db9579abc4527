"""Templates, the texts of `messages/`, and numbers and times as people read them.

Every text of a page stands in a message file, under a key that its template names; so a language is one more file.
Templates escape all that they are given. The look is that of our reports: `report/templates/` has colours and parts.
"""

import datetime
import re
import time
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from obfuscatune.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment

LANGUAGE = "en"
_NOTHING = "–"
_DIGEST = re.compile(r"\b[0-9a-f]{32,}\b")


@cache
def messages(language: str = LANGUAGE) -> Mapping[str, str]:
    """All texts of a language, by keys such as `jobs.title`.

    Raises:
        ConfigError: a value is no text.
    """
    content = (files("obfuscatune.console") / "messages" / f"{language}.toml").read_text("utf-8")
    return _flat(tomllib.loads(content), "")


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            found[prefix + name] = value
        else:
            raise ConfigError(f"message {prefix}{name}: expected a text")
    return found


def text(key: str, **values: object) -> str:
    """A text, with values in the places that it has for them.

    Raises:
        ConfigError: there is no such text.
    """
    try:
        return messages()[key].format_map(values)
    except KeyError as error:
        raise ConfigError(f"message {key}: {error} is missing") from None


def text_or(key: str, default: str) -> str:
    """A text, or `default` where nobody wrote one."""
    return messages().get(key, default)


def format_count(value: Any) -> str:
    """`1,557,611`; of what is no number, a dash."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _NOTHING


def format_small(value: Any) -> str:
    """`1.9e-05`: two significant digits."""
    return f"{value:.2g}" if isinstance(value, int | float) and not isinstance(value, bool) else _NOTHING


def format_bytes(value: Any) -> str:
    """`1.2 MB`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _NOTHING
    size = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_time(value: Any) -> str:
    """Unix seconds as `2026-11-29 14:05 UTC`."""
    return _written(value, "%Y-%m-%d %H:%M UTC")


def format_moment(value: Any) -> str:
    """Unix seconds as `2026-11-29 14:05:33 UTC`."""
    return _written(value, "%Y-%m-%d %H:%M:%S UTC")


def _written(value: Any, form: str) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 253402300800:
        return _NOTHING
    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime(form)


def format_span(seconds: Any) -> str:
    """A length of time: `42 s`, `3 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 1e12:
        return _NOTHING
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def format_ago(value: Any) -> str:
    """How long ago a time in Unix seconds was."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _NOTHING
    return text("common.ago", span=format_span(max(0.0, time.time() - value)))


def brief(value: Any) -> str:
    """A text whose digests and keys are cut to their beginnings."""
    return _DIGEST.sub(lambda found: short(found[0]), str(value))


def short(value: Any, characters: int = 12) -> str:
    """The beginning of a digest or a key."""
    told = str(value)
    return told if len(told) <= characters + 1 else told[:characters] + "…"


@cache
def environment() -> "Environment":
    """All text in templates is escaped; what they name has to be there."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader("obfuscatune.console"), PackageLoader("obfuscatune.report")]
    made = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals.update(t=text, t_or=text_or, language=LANGUAGE)
    filters = {"count": format_count, "bytes": format_bytes, "time": format_time, "span": format_span}
    made.filters.update(filters, moment=format_moment, small=format_small, ago=format_ago, short=short, brief=brief)
    return made


def render(template: str, **values: Any) -> str:
    """A page, or a part of one."""
    return environment().get_template(template).render(values)


@cache
def style_sheet() -> bytes:
    """The one style sheet: the colours and parts of our reports, then what consoles add."""
    return environment().get_template("console.css").render().encode()
