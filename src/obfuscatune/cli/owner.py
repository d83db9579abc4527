"""`obfuscatune owner`: what the owner of data does on his own machine. One command a function."""

from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import console, options, sealing, service_use
from obfuscatune.cli.groups import command_group, command_of

owner = command_group("owner", "Seal data, and use a service that you have checked.")


@command_of(
    owner,
    "obfuscatune owner seal train.jsonl -o bundle/ --identity keys/owner",
    "obfuscatune owner seal runs/notes/adapter -o adapter-bundle/ --identity keys/owner",
)
def seal(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A JSON Lines file, or the folder of a LoRA adapter.")],
    *,
    out: sealing.Out,
    identity: sealing.Identity,
    key_out: sealing.KeyOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Encrypt a data set or an adapter into a bundle, which may lie on storage that you do not trust.

    The bundle opens with the key file alone. The storage sees how large it is, and not even a file's name.
    """
    from obfuscatune.sealing.source import check_adapter, check_records

    if data.is_dir():
        sealing.seal_and_tell(data, "adapter", check_adapter, out, key_out, identity, as_json)
    else:
        sealing.seal_and_tell(data, "data", check_records, out, key_out, identity, as_json)


command_of(
    owner,
    "obfuscatune owner unseal bundle/ --key bundle.key -o data",
)(sealing.unseal)


_ON = "--enclave enclave.example:7700 --policy policy.yaml --identity keys/me"
command_of(owner, f"obfuscatune owner proxy {_ON}")(service_use.proxy)
command_of(owner, f"obfuscatune owner submit {_ON} --data train.jsonl --model llama --watch")(service_use.submit)
command_of(owner, f"obfuscatune owner jobs {_ON}")(service_use.jobs)
command_of(owner, f"obfuscatune owner fetch-adapter {_ON} --job ftjob-abc123 --out adapter/")(service_use.fetch_adapter)
command_of(owner, f"obfuscatune owner receipt {_ON} --job ftjob-abc123 --out receipt.json")(service_use.receipt)
command_of(owner, f"obfuscatune owner audit-log {_ON} --out audit.jsonl")(service_use.audit_log)
command_of(owner, f"obfuscatune owner console {_ON} --open", name="console")(console.owner_console)
