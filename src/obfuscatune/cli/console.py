"""`obfuscatune owner console`, `provider console`: pages of this machine, on what it verified itself."""

from pathlib import Path
from typing import Annotated

from obfuscatune.cli import output
from obfuscatune.cli.attested import EnclaveOptions, parse_enclave
from obfuscatune.cli.service_use import ServiceOptions
from obfuscatune.option import Option

Port = Annotated[int, Option("Of 127.0.0.1; 0 takes any that is free.", least=0, most=65535)]
Open = Annotated[bool, Option("Open the link in this machine's browser.", name="open")]


def owner_console(*, on: ServiceOptions, port: Port = 8010, opens: Open = False) -> None:
    """Open your console: what was verified, your data, jobs with their losses, tuned models beside their base.

    It is served on 127.0.0.1 alone and prints a link that works once. The enclave is verified before the first page and
    again while the console runs; when that fails, nothing is sent any more, and every page says so.
    """
    from obfuscatune.console.connection import OwnerConnection
    from obfuscatune.console.owner import owner_console as make_console
    from obfuscatune.console.serving import listen, serve

    connect, identity = on.connector()
    enclave, api, heads = parse_enclave(on.enclave), on.api_address, on.head_file
    with listen(port) as listening:
        connection = OwnerConnection(connect, enclave, identity, api=api, heads=heads, tell=output.notice)
        connection.supervisor.check()  # what it finds is what the first page shows
        on.keep(connection.found.record)
        shell = make_console(connection, output.notice)
        serve(shell, listening, output.write_text, beside=connection.running(), opens_browser=opens)


def provider_console(
    *,
    on: EnclaveOptions,
    keys: Annotated[Path, Option("Folder of your bundles' key files, by `provider seal --key-out`.")],
    releases: Annotated[
        Path | None,
        Option("Folder that keeps on what evidence each key was released.", unset="releases, within --keys"),
    ] = None,
    port: Port = 8020,
    opens: Open = False,
) -> None:
    """Open your console: sealed models, grants and what was used of them, consents that owners wait for, released keys.

    It is served on 127.0.0.1 alone and prints a link that works once. The enclave is verified anew for every look at it
    and for every key that is released.
    """
    from obfuscatune.console.provider import ProviderConnection
    from obfuscatune.console.provider import provider_console as make_console
    from obfuscatune.console.serving import listen, serve

    connect, identity = on.connector()
    with listen(port) as listening:
        connection = ProviderConnection(
            connect, parse_enclave(on.enclave), identity, keys, releases or keys / "releases"
        )
        serve(make_console(connection, output.notice), listening, output.write_text, opens_browser=opens)
