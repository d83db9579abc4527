"""Files of keys and values in YAML, read strictly: run files, policies, a service's settings."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from obfuscatune.errors import ConfigError


class UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a file with two is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused beneath
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_mapping(content: bytes, path: Path, expected: str, loader: type[UniqueKeys] = UniqueKeys) -> dict[str, Any]:
    """The keys and values of a file.

    Args:
        content: What it holds.
        path: For messages.
        expected: What it should have held, where it holds something else.
        loader: One that refuses more.

    Raises:
        ConfigError: it is no YAML, a key is given twice, or it holds no keys and values; the message names the line.
    """
    try:
        value = yaml.load(content.decode("utf-8"), loader)  # noqa: S506  a SafeLoader
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: malformed YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: malformed YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {expected}")
    return value
