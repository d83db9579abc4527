"""`obfuscatune provider grant`, `revoke`, `consent`, `status`: nothing is released before the enclave is verified."""

from pathlib import Path
from typing import Annotated, Any

from obfuscatune.cli import options, output
from obfuscatune.cli.attested import EnclaveOptions, read_fingerprint
from obfuscatune.errors import ConfigError, IntegrityError
from obfuscatune.option import Option

Name = Annotated[str, Option("The model's name, by which clients ask for it.")]
Bundle = Annotated[str, Option("Where the enclave finds the bundle: a folder or URL of its own side.")]
KeyFileOption = Annotated[Path, Option("The bundle's key file, by `provider seal`.")]


def grant(
    *,
    on: EnclaveOptions,
    bundle: Bundle,
    key_file: KeyFileOption,
    name: Name,
    owner: Annotated[
        list[str], Option("Certificate (or fingerprint) of an owner who may use the model; may be repeated.")
    ],
    until: Annotated[str, Option("When it ends, in UTC: 2027-01-01, or 2027-01-01T12:00:00Z.")],
    uses: Annotated[str, Option("inference, fine-tuning, or both with a comma between.")] = "inference,fine-tuning",
    export: Annotated[
        str,
        Option(
            "Whether an adapter may leave the enclave: never, provider-consent (see `provider consent`) or allowed.",
            choices=("never", "provider-consent", "allowed"),
        ),
    ] = "never",
    tokens: Annotated[int | None, Option("Most tokens, of all owners and uses.", unset="any number", least=1)] = None,
    as_json: options.AsJson = False,
) -> None:
    """Release a bundle's key to an enclave that your policy accepts, with the terms of its use.

    What was checked is printed first. The key is sealed to the enclave's attested key, for this session alone. An
    enclave that restarts has it no more, and is granted it anew. A grant takes the place of an older one.
    """
    from obfuscatune.channel.grants import Grant, Terms, next_sequence, read_time
    from obfuscatune.sealing.key_file import KeyFile

    kept = KeyFile.read(key_file)
    try:
        if kept.kind != "model":
            raise ConfigError(f"--key-file {key_file} is of a bundle that holds a {kept.kind}, not a model")
        owners = tuple(read_fingerprint(path, "--owner") for path in owner)
        try:
            terms = Terms(owners, tuple(it.strip() for it in uses.split(",")), export, read_time(until), tokens)
            granted = Grant(name, kept.manifest_digest, bundle, terms, next_sequence())
        except IntegrityError as error:
            raise ConfigError(f"these terms cannot be granted: {error}") from None
        with on.connected() as (channel, identity):
            if kept.signer != identity.key.public_key().public_bytes_raw().hex():
                raise ConfigError(f"the bundle was sealed by another identity than {on.identity}: grant it by that one")
            with kept.key.secret.view as view:
                told = channel.release("grant", granted.sign(identity), bytes(view))
    finally:
        kept.key.close()
    _answer({"granted": name, "grant": granted.id, "manifest": granted.manifest, "enclave": told}, as_json)


def revoke(*, on: EnclaveOptions, name: Name, key_file: KeyFileOption, as_json: options.AsJson = False) -> None:
    """Take back what was granted for a model: the enclave forgets its key, and takes no older grant any more."""
    from obfuscatune.channel.grants import Revocation, next_sequence

    manifest = _manifest(key_file)
    with on.connected() as (channel, identity):
        told = channel.request("revoke", _made(Revocation, name, manifest, next_sequence()).sign(identity))
    _answer({"revoked": name, "enclave": told}, as_json)


def consent(
    *,
    on: EnclaveOptions,
    name: Name,
    key_file: KeyFileOption,
    owner: Annotated[str, Option("Certificate (or fingerprint) of the adapter's owner.")],
    adapter: Annotated[str, Option("The adapter, as the enclave names it.")],
    as_json: options.AsJson = False,
) -> None:
    """Let one adapter leave the enclave, to its owner, where the grant says --export provider-consent."""
    from obfuscatune.channel.grants import Consent

    manifest, to = _manifest(key_file), read_fingerprint(owner, "--owner")
    with on.connected() as (channel, identity):
        told = channel.request("consent", _made(Consent, name, manifest, to, adapter).sign(identity))
    _answer({"consented": adapter, "owner": to, "enclave": told}, as_json)


def status(*, on: EnclaveOptions, as_json: options.AsJson = False) -> None:
    """Verify an enclave, and ask it what stands of your grants."""
    with on.connected() as (channel, _):
        told = channel.request("status", {})
    _answer(told, as_json)


def _manifest(key_file: Path) -> str:
    from obfuscatune.sealing.key_file import KeyFile

    kept = KeyFile.read(key_file)
    kept.key.close()
    return kept.manifest_digest


def _made(kind: Any, *fields: Any) -> Any:
    try:
        return kind(*fields)
    except IntegrityError as error:
        raise ConfigError(f"this cannot be asked for: {error}") from None


def _flat(told: Any, prefix: str = "") -> dict[str, Any]:
    """What an enclave tells, a line for each value."""
    if not isinstance(told, dict | list):
        return {prefix: told}
    items = told.items() if isinstance(told, dict) else enumerate(told, 1)
    lines: dict[str, Any] = {}
    for key, value in items:
        label = output.printable(key)
        lines |= _flat(value, f"{prefix}.{label}" if prefix else label)
    return lines


def _answer(told: dict[str, Any], as_json: bool) -> None:
    output.write_result(told, output.labelled(_flat(told)), as_json=as_json)
