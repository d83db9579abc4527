"""Reading a policy file: YAML without surprises, errors that name the key, and signed reference values.

Whoever signed reference values, an Ed25519 key or an identity of sigstore's, is named by the policy and no other file.
"""

from collections.abc import Hashable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from obfuscatune.documents import canonical, has_fields, parse, verify
from obfuscatune.errors import ConfigError, IntegrityError
from obfuscatune.yaml_file import UniqueKeys, parse_mapping

MOST_BYTES = 2**20
"""Of a policy, and of reference values."""
PURPOSE = "reference-values"
BUNDLE_SUFFIX = ".sigstore.json"
"""Behind the name of a file that a sigstore bundle is of."""
MERGED = {
    "tdx": ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_seam"),
    "sgx": ("mr_enclave",),
    "sev-snp": ("measurement",),
    "nvidia": ("driver_versions", "vbios_versions"),
    "simulated": ("measurement",),
    "claims": ("software",),
}
"""The sets that reference values may add to. They name measurements of programs, never keys nor what is allowed."""


def read_policy_file(path: Path, reference_model: type[BaseModel]) -> dict[str, Any]:
    """Keys and values of a policy file, with the reference values that it names.

    Raises:
        ConfigError: a file cannot be read, or is no policy.
        IntegrityError: the reference values are not what a trusted key signed.
    """
    document = _read_yaml(path)
    wanted = document.get("reference_values")
    if wanted is None:
        return document
    where = f"{path}: reference_values"
    if not isinstance(wanted, dict) or {"sequence", "expires"} & set(wanted):
        raise ConfigError(f"{where} has a file, keys or sigstore and, if you like, a minimum_sequence")
    try:
        checked = reference_model.model_validate_json(canonical(wanted)).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ConfigError(explain(error, where, reference_model)) from error
    except ValueError as error:  # a date, a fraction: values that documents have not
        raise ConfigError(f"{where}: {error}") from error
    values = _read_reference_values(path.parent / checked["file"], checked)
    document["reference_values"] = wanted | {"sequence": values["sequence"], "expires": values["expires"]}
    merge(document, values["values"])
    return document


def merge(document: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add reference values to the sets of a policy, in place. Sections that the policy has not are left out.

    Raises:
        ConfigError: they name what they may not set.
    """
    for section, sets in values.items():
        if section not in MERGED or not isinstance(sets, dict):
            raise ConfigError(f"reference values: no section {section!r:.40}; there are {', '.join(MERGED)}")
        for name, added in sets.items():
            if name not in MERGED[section] or not isinstance(added, list):
                raise ConfigError(f"reference values: {section} has {', '.join(MERGED[section])}; found {name!r:.40}")
            target = document.get(section)
            if not isinstance(target, dict):
                continue
            present = target.get(name, [])
            if present == "any":
                raise ConfigError(f"{section}.{name} is any, and reference values name it: take out one of them")
            target[name] = [*(present if isinstance(present, list) else [present]), *added]


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One line about the first thing that is wrong, with what was probably meant."""
    found = error.errors()
    first = next((it for it in found if it["type"] == "extra_forbidden"), found[0])
    names = [str(part) for part in first["loc"] if not isinstance(part, str) or "[" not in part]
    key = ".".join(names)
    if first["type"] == "extra_forbidden":
        known = list(_known(model, names[:-1]))
        near = get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        return f"{where}: unknown key {key}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"


def _known(model: type[BaseModel], path: list[str]) -> Iterator[str]:
    """The keys of the section that a path of keys leads to."""
    for name in path:
        field = next((it for key, it in model.model_fields.items() if name in (key, it.alias)), None)
        if field is None:
            return
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return
        model = inner[0]
    yield from (field.alias or key for key, field in model.model_fields.items())


def _read_reference_values(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a file of reference values, signed by one of the keys or by an identity of sigstore's."""
    content = _read_bytes(path)
    try:
        if "sigstore" in wanted:
            document = _signed_by_identity(path, content, wanted["sigstore"])
        else:
            document = verify(parse(content, most_bytes=MOST_BYTES), PURPOSE, set(wanted["keys"]))
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from error
    expected = {"version": int, "sequence": int, "expires": int, "values": dict}
    if not has_fields(document, expected):
        raise ConfigError(f"{path}: reference values have a version, sequence, expires (Unix seconds) and values")
    if document["version"] != 1:
        raise ConfigError(f"{path}: reference values of version {document['version']}; this program reads 1")
    if document["sequence"] < wanted["minimum_sequence"]:
        raise ConfigError(
            f"{path}: reference values of sequence {document['sequence']}, older than the minimum_sequence "
            f"{wanted['minimum_sequence']} of the policy"
        )
    return document


def _signed_by_identity(path: Path, content: bytes, signer: Mapping[str, str]) -> dict[str, Any]:
    """The document that a file is, and whose signature lies beside it in a bundle."""
    from obfuscatune.attest.sigstore_bundle import verify_bundle

    bundle = _read_bytes(path.with_name(path.name + BUNDLE_SUFFIX))
    root = path.parent / signer["trusted_root"]
    verify_bundle(content, bundle, root, identity=signer["identity"], issuer=signer["issuer"])
    return parse(content, most_bytes=MOST_BYTES)


class _PolicyLoader(UniqueKeys):
    """Keys are text, and values are written out."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        if not all(isinstance(key, str) for key in mapping):
            raise yaml.MarkedYAMLError(None, None, "a key that is no text: put it in quotes", node.start_mark)
        return mapping

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias: write values out")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    expected = "a policy has keys and values, such as `version: 1`; an empty one accepts nothing"
    return parse_mapping(_read_bytes(path), path, expected, _PolicyLoader)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: larger than {MOST_BYTES:,} bytes")
    return data
