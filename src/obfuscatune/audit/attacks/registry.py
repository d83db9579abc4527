"""All attacks, in the order in which they are run and shown."""

from __future__ import annotations

from obfuscatune.audit.attacks.adapters import AdapterInputs, AdapterLabels, AdapterRecovery
from obfuscatune.audit.attacks.base import Attack
from obfuscatune.audit.attacks.dictionary import BagOfTokens, DictionaryMembership, NormMatching, OutputMatching
from obfuscatune.audit.attacks.frequency import FrequencyDecipherment
from obfuscatune.audit.attacks.labels import LabelInference
from obfuscatune.audit.attacks.linkage import DecodingLinkage, ExampleLinkage, PrefixLinkage, RowEquality
from obfuscatune.audit.attacks.plaintext import KnownPlaintext
from obfuscatune.audit.attacks.separation import SourceSeparation
from obfuscatune.audit.attacks.stealing import StealingFromBase, StealingFromNothing
from obfuscatune.audit.attacks.structure import BasisStitching, GridFromBase, GridFromTraffic
from obfuscatune.audit.attacks.traffic import Shapes, Timing
from obfuscatune.audit.attacks.weights import ArrowMatch, OneSidedProcrustes, SingularValues, TwoSidedAlignment

ATTACKS: tuple[Attack, ...] = (
    RowEquality(),
    DecodingLinkage(),
    FrequencyDecipherment(),
    SourceSeparation(),
    NormMatching(),
    OutputMatching(),
    DictionaryMembership(),
    BagOfTokens(),
    LabelInference(),
    AdapterInputs(),
    AdapterLabels(),
    SingularValues(),
    OneSidedProcrustes(),
    TwoSidedAlignment(),
    ArrowMatch(),
    AdapterRecovery(),
    StealingFromNothing(),
    StealingFromBase(),
    PrefixLinkage(),
    ExampleLinkage(),
    BasisStitching(),
    GridFromTraffic(),
    GridFromBase(),
    KnownPlaintext(),
    Shapes(),
    Timing(),
)
