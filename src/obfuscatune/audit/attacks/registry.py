"""All attacks, in the order in which they are run and shown."""

from __future__ import annotations

from obfuscatune.audit.attacks.adapters import AdapterInputs, AdapterLabels, AdapterRecovery
from obfuscatune.audit.attacks.base import Attack
from obfuscatune.audit.attacks.dictionary import BagOfTokens, DictionaryMembership, NormMatching, OutputMatching
from obfuscatune.audit.attacks.frequency import FrequencyDecipherment
from obfuscatune.audit.attacks.intersections import SharedRows
from obfuscatune.audit.attacks.labels import LabelInference
from obfuscatune.audit.attacks.linkage import DecodingLinkage, ExampleLinkage, PrefixLinkage, RowEquality
from obfuscatune.audit.attacks.membership import DocumentMembership
from obfuscatune.audit.attacks.moments import DECODING_MOMENTS, EXAMPLE_MOMENTS, PROMPT_MOMENTS
from obfuscatune.audit.attacks.one_time import MaskGaps, ReusedMasks
from obfuscatune.audit.attacks.plaintext import KnownPlaintext
from obfuscatune.audit.attacks.separation import SourceSeparation
from obfuscatune.audit.attacks.stealing import StealingFromBase, StealingFromNothing
from obfuscatune.audit.attacks.structure import BasisStitching, GridFromBase, GridFromTraffic
from obfuscatune.audit.attacks.traffic import Shapes, Timing
from obfuscatune.audit.attacks.vocabulary import VocabularyMatching
from obfuscatune.audit.attacks.weights import ArrowMatch, OneSidedProcrustes, SingularValues, TwoSidedAlignment

ATTACKS: tuple[Attack, ...] = (
    RowEquality(),
    DecodingLinkage(),
    DECODING_MOMENTS,
    SharedRows(),
    ReusedMasks(),
    MaskGaps(),
    FrequencyDecipherment(),
    SourceSeparation(),
    NormMatching(),
    VocabularyMatching(),
    OutputMatching(),
    DictionaryMembership(),
    BagOfTokens(),
    DocumentMembership(),
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
    PROMPT_MOMENTS,
    ExampleLinkage(),
    EXAMPLE_MOMENTS,
    BasisStitching(),
    GridFromTraffic(),
    GridFromBase(),
    KnownPlaintext(),
    Shapes(),
    Timing(),
)
