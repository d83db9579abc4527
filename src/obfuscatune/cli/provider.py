"""`obfuscatune provider`: what the owner of a model does on his own machine. One command a function."""

from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import console, grants, options, sealing
from obfuscatune.cli.groups import command_group, command_of

provider = command_group("provider", "Seal a model, and release its key to an enclave that you have checked.")


@command_of(provider, "obfuscatune provider seal ./llama -o bundle/ --identity keys/provider")
def seal(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model in Hugging Face's layout.")],
    *,
    out: sealing.Out,
    identity: sealing.Identity,
    key_out: sealing.KeyOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Encrypt a model into a bundle, which may lie on storage that you do not trust.

    All files of the folder are sealed, names and sizes too. The bundle opens with the key file alone, and a grant
    releases its key to one enclave. What the storage changes, leaves out or brings back from before is refused there.
    """
    from obfuscatune.sealing.source import check_model

    sealing.seal_and_tell(model, "model", check_model, out, key_out, identity, as_json)


command_of(
    provider,
    "obfuscatune provider unseal bundle/ --key bundle.key",
    "obfuscatune provider unseal s3://models/llama --key llama.key -o llama-again",
)(sealing.unseal)


_ENCLAVE = "--enclave enclave.example:7700 --policy policy.yaml --identity keys/provider"
command_of(
    provider,
    f"obfuscatune provider grant {_ENCLAVE} --bundle bundle/ --key-file bundle.key --name llama --owner owner.pem "
    "--uses inference,fine-tuning --export provider-consent --until 2027-01-01 --tokens 1000000",
)(grants.grant)
command_of(provider, f"obfuscatune provider revoke {_ENCLAVE} --key-file bundle.key --name llama")(grants.revoke)
command_of(
    provider,
    f"obfuscatune provider consent {_ENCLAVE} --key-file bundle.key --name llama --owner owner.pem "
    "--adapter ft:llama:1",
)(grants.consent)
command_of(provider, f"obfuscatune provider status {_ENCLAVE}")(grants.status)
command_of(provider, f"obfuscatune provider console {_ENCLAVE} --keys keys --open", name="console")(
    console.provider_console
)
