"""What a verifier accepts: a YAML file, read strictly.

    version: 1
    require: [[tdx, sev-snp], [nvidia]]     # every line, by evidence of one of its kinds
    tdx: {mr_td: [...], rtmr0: [...]}       # what is accepted of each kind that is required
    claims: {configuration: [...]}          # what the program may say of itself

A key that is unknown is refused, as is a section that nothing requires. docs/attestation.md describes every key.
"""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from obfuscatune import documents
from obfuscatune.attest.checks import ANY
from obfuscatune.attest.evidence import Kind
from obfuscatune.attest.policy_file import explain, read_policy_file
from obfuscatune.errors import ConfigError


def _hex(length: int) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A validator of sets of values of so many bytes in hex."""
    pattern = re.compile(rf"[0-9a-f]{{{2 * length}}}\Z")

    def check(values: tuple[str, ...]) -> tuple[str, ...]:
        if values == ANY:
            return values
        if not values:
            raise ValueError("an empty set allows nothing: name a value")
        if not all(pattern.match(value) for value in values):
            raise ValueError(f"expected {length} bytes in lower-case hex, in quotes")
        return _sorted(values)

    return check


def _wrap_any(value: Any) -> Any:
    """Python's values from here on, which are strict about tuples."""
    return ANY if value == ANY[0] else tuple(value) if isinstance(value, list) else value


def _refuse_any(values: tuple[str, ...]) -> tuple[str, ...]:
    if values == ANY:
        raise ValueError("a key has to be named")
    return values


def _none_or(check: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    return lambda values: check(values) if values else values


def _sorted(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


Digests48 = Annotated[tuple[str, ...], BeforeValidator(_wrap_any), AfterValidator(_hex(48))]
Digests32 = Annotated[tuple[str, ...], BeforeValidator(_wrap_any), AfterValidator(_hex(32))]
Masks8 = Annotated[tuple[str, ...], BeforeValidator(_wrap_any), AfterValidator(_hex(8))]
Keys = Annotated[tuple[str, ...], AfterValidator(_refuse_any), AfterValidator(_hex(32))]
Workers = Annotated[tuple[str, ...], BeforeValidator(_wrap_any), AfterValidator(_none_or(_hex(32)))]
NamedWorkers = Annotated[tuple[str, ...], AfterValidator(_refuse_any), AfterValidator(_none_or(_hex(32)))]
Texts = Annotated[tuple[str, ...], AfterValidator(_sorted)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Byte = Annotated[int, Field(ge=0, le=255)]
Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
ZERO_48 = ("00" * 48,)
ZERO_32 = ("00" * 32,)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]
"""Of Intel's collateral. A revoked TCB cannot be allowed."""


class DcapPolicy(_Section):
    """What TDX and SGX have in common: the state of Intel's platform."""

    tcb_statuses: Annotated[tuple[TcbStatus, ...], Field(min_length=1)] = ("UpToDate",)
    advisories: Texts = ()
    """Intel's advisories that may apply to the platform, as INTEL-SA-00615."""
    minimum_tcb_evaluation: Count = 0
    """Of the collateral: Intel raises the number with each TCB recovery."""
    allow_dynamic_platform: bool = False
    allow_cached_keys: bool = False
    allow_smt: bool = False


class TdxPolicy(DcapPolicy):
    """Of a TDX quote. A measurement of the TD that is not named must be zero."""

    mr_td: Digests48
    rtmr0: Digests48 = ZERO_48
    rtmr1: Digests48 = ZERO_48
    rtmr2: Digests48 = ZERO_48
    rtmr3: Digests48 = ZERO_48
    mr_config_id: Digests48 = ZERO_48
    mr_owner: Digests48 = ZERO_48
    mr_owner_config: Digests48 = ZERO_48
    mr_service_td: Digests48 = ZERO_48
    """The TD that may migrate this one; quotes of TDX 1.5 alone have it."""
    mr_seam: Digests48 = ANY
    """The TDX module. Intel's collateral says which are current."""
    xfam: Masks8 = ANY
    minimum_tee_tcb_svn: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = "00" * 16
    """Security version numbers of the TDX module, byte by byte."""


class SgxPolicy(DcapPolicy):
    """Of an SGX quote: the enclave itself, or its signer with product and least security version."""

    mr_enclave: Digests32 | None = None
    mr_signer: Digests32 | None = None
    isv_prod_id: Annotated[int, Field(ge=0, le=65535)] | None = None
    minimum_isv_svn: Annotated[int, Field(ge=0, le=65535)] = 0

    @model_validator(mode="after")
    def _names_an_enclave(self) -> Self:
        by_signer = self.mr_signer not in (None, ANY) and self.isv_prod_id is not None
        if self.mr_enclave in (None, ANY) and not by_signer:
            raise ValueError("name mr_enclave, or mr_signer and isv_prod_id")
        return self


class SnpTcb(_Section):
    """Security version numbers of AMD's firmware. Turin alone has `fmc`."""

    fmc: Byte = 0
    bootloader: Byte
    tee: Byte
    snp: Byte
    microcode: Byte


class SnpPolicy(_Section):
    """Of an SEV-SNP report."""

    measurement: Digests48
    minimum_tcb: SnpTcb
    """For every TCB of the report: current, reported, committed, at launch."""
    host_data: Digests32 = ZERO_32
    id_key_digest: Digests48 = ANY
    author_key_digest: Digests48 = ANY
    minimum_guest_svn: Count = 0
    vmpl: Annotated[tuple[Annotated[int, Field(ge=0, le=3)], ...], Field(min_length=1)] = (0,)
    signing_keys: Annotated[tuple[Literal["vcek", "vlek"], ...], Field(min_length=1)] = ("vcek", "vlek")
    allow_milan: bool = False
    """Milan's attestation root has been extracted (arXiv 2605.12990): a report proves nothing by itself."""
    allow_smt: bool = False
    allow_migration_agent: bool = False
    require_alias_check: bool = False
    """That the firmware looked for memory that answers to two addresses (BadRAM)."""
    require_ciphertext_hiding: bool = False
    require_crl: bool = False
    """That the evidence brings AMD's revocation list. One that it brings is checked in any case."""


class NvidiaPolicy(_Section):
    """Of the report of each GPU."""

    count: Annotated[int, Field(ge=1, le=16)] = 1
    """GPUs, each with its own key."""
    driver_versions: Texts
    vbios_versions: Texts
    measurements: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]?$")], Digests48] = {}
    """By index, as NVIDIA's reference manifests name them."""


class TpmPolicy(_Section):
    """Of a TPM 2.0 quote."""

    attestation_keys: Keys
    """SHA-256 of each key's SubjectPublicKeyInfo, known from the machine's enrolment."""
    pcrs: Annotated[dict[Annotated[str, Field(pattern=r"^(1?[0-9]|2[0-3])$")], Digests32], Field(min_length=1)]
    """By index, of the bank of SHA-256."""


class SimulatedPolicy(_Section):
    """Of simulated evidence, which proves nothing."""

    keys: Keys
    """Ed25519 public keys."""
    measurement: Digests48 = ANY


class ClaimsPolicy(_Section):
    """What the program may say of itself. What is not named must be empty in the claims."""

    configuration: Keys
    arguments: Annotated[tuple[tuple[str, ...], ...], Field(min_length=1)] = ((),)
    """Whole command lines."""
    environment: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    """By variable, which values it may have; each may be unset as well."""
    software: Digests32 = ANY
    workers: Workers = ()
    mask_workers: NamedWorkers = ()
    least_profile: Literal["paper", "private", "guarded", "enclave"] = "private"


class SigstoreSigner(_Section):
    """Whose signature a sigstore bundle has to have. It lies beside the file, its name ending with .sigstore.json."""

    identity: Text
    """In the signing certificate: an e-mail address, or the URI of a workflow, wholly."""
    issuer: Text
    """The identity provider that vouched for it, as https://accounts.example."""
    trusted_root: Text
    """File with sigstore's certificate authorities and logs, beside the reference values."""


class ReferenceValues(_Section):
    """A signed file, which adds values to the sets of measurements."""

    file: str
    keys: Keys | None = None
    """Ed25519 public keys, one of which signed it."""
    sigstore: SigstoreSigner | None = None
    minimum_sequence: Count = 0
    sequence: Count | None = None
    """Of the file that was read."""
    expires: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _names_one_signer(self) -> Self:
        if (self.keys is None) == (self.sigstore is None):
            raise ValueError("name keys, or sigstore with identity, issuer and trusted_root: who signed the file")
        return self

    @property
    def signer(self) -> str:
        """Who signed it, for people."""
        if self.sigstore is not None:
            return f"{self.sigstore.identity}, by {self.sigstore.issuer}, in a sigstore bundle"
        return f"one of {len(self.keys or ())} keys"


class Policy(_Section):
    """What a verifier accepts."""

    version: Annotated[int, Field(ge=1, le=1)]
    require: Annotated[
        tuple[Annotated[tuple[Kind, ...], Field(min_length=1)], ...],
        Field(min_length=1),
    ]
    tdx: TdxPolicy | None = None
    sgx: SgxPolicy | None = None
    sev_snp: Annotated[SnpPolicy | None, Field(alias="sev-snp")] = None
    nvidia: NvidiaPolicy | None = None
    tpm: TpmPolicy | None = None
    simulated: SimulatedPolicy | None = None
    allow_simulated: bool = False
    claims: ClaimsPolicy
    freshness_seconds: Annotated[int, Field(ge=1, le=30 * 86400)] = 3600
    """For so long after it was obtained is evidence accepted, and what was verified relied upon."""
    reference_values: ReferenceValues | None = None

    @model_validator(mode="after")
    def _sections_match_requirements(self) -> Self:
        required = {kind for kinds in self.require for kind in kinds}
        for kind in required:
            if self.section(kind) is None:
                raise ValueError(f"require names {kind}, and there is no section {kind}: to say what is accepted")
        for kind in ("tdx", "sgx", "sev-snp", "nvidia", "tpm", "simulated"):
            if self.section(kind) is not None and kind not in required:
                raise ValueError(f"there is a section {kind}:, and require does not name it")
        return self

    @classmethod
    def from_file(cls, path: Path) -> "Policy":
        """Read a policy, and the reference values that it names.

        Raises:
            ConfigError: it cannot be read, or is none; the message names key and remedy.
            IntegrityError: the reference values are not signed by whom the policy names.
        """
        return cls.from_document(read_policy_file(path, ReferenceValues), str(path))

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str = "policy") -> "Policy":
        """Read a policy from keys and values.

        Raises:
            ConfigError: it is none.
        """
        try:
            return cls.model_validate_json(documents.canonical(dict(document)))
        except ValidationError as error:
            raise ConfigError(explain(error, where, cls)) from error
        except ValueError as error:  # a date, a fraction: values that documents have not
            raise ConfigError(f"{where}: {error}") from error

    def to_document(self) -> dict[str, Any]:
        """The policy as it is applied: with defaults, and with the reference values that were read."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the policy as it is applied, in hex."""
        return documents.digest(self.to_document())

    def expires(self, obtained: int) -> int:
        """Until when evidence that came then is relied upon: Unix seconds, as both are."""
        end = obtained + self.freshness_seconds
        reference = self.reference_values
        return end if reference is None or reference.expires is None else min(end, reference.expires)

    def section(self, kind: str) -> BaseModel | None:
        """The section of a kind of evidence."""
        found: BaseModel | None = getattr(self, kind.replace("-", "_"))
        return found
