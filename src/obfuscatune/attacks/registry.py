"""All attacks, in the order in which they are run and shown."""

from __future__ import annotations

from obfuscatune.attacks.adapters import AdapterInputs, AdapterLabels, AdapterRecovery
from obfuscatune.attacks.bag import BagOfTokens
from obfuscatune.attacks.base import Attack
from obfuscatune.attacks.dictionary import DictionaryMembership, OutputMatching
from obfuscatune.attacks.equality import DecodingLinkage, RowEquality
from obfuscatune.attacks.frequency import FrequencyDecipherment
from obfuscatune.attacks.kronecker import GridFromBase, GridFromTraffic
from obfuscatune.attacks.labels import LabelInference
from obfuscatune.attacks.linkage import ExampleLinkage, PrefixLinkage
from obfuscatune.attacks.norms import NormMatching
from obfuscatune.attacks.plaintext import KnownPlaintext
from obfuscatune.attacks.separation import SourceSeparation
from obfuscatune.attacks.shapes import Shapes
from obfuscatune.attacks.stealing import StealingFromBase, StealingFromNothing
from obfuscatune.attacks.stitching import BasisStitching
from obfuscatune.attacks.timing import Timing
from obfuscatune.attacks.weights import ArrowMatch, OneSidedProcrustes, SingularValues, TwoSidedAlignment

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
