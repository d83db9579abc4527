"""The whole demo of three parties: a scene for each profile, then the search of what left its enclave."""

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from obfuscatune.demo.parties import search
from obfuscatune.demo.parties.machines import LOOPBACK, machines
from obfuscatune.demo.parties.result import Result, Scene
from obfuscatune.demo.parties.stage import MACHINES, Stage
from obfuscatune.demo.parties.story import EPOCHS, Screen, Story
from obfuscatune.errors import ConfigError
from obfuscatune.report.page import environment

PROFILES = ("private", "guarded")


@dataclass(frozen=True)
class PartiesSettings:
    """What the user chose. `quick` trains for one epoch, which teaches little."""

    profiles: tuple[str, ...] = PROFILES
    quick: bool = False
    seed: int = 0
    isolated: bool = False

    def __post_init__(self) -> None:
        unknown = [it for it in self.profiles if it not in PROFILES]
        if unknown:
            raise ConfigError(f"--profile {unknown[0]}: three parties play under {' or '.join(PROFILES)}")
        if self.seed < 0:
            raise ConfigError(f"--seed: expected 0 or more, found {self.seed}")


def run_parties(settings: PartiesSettings, folder: Path, screen: Screen) -> Result:
    """Play, search, and clean up what only the search needed.

    Args:
        folder: with a directory for each profile afterwards, and in that one for each party.

    Raises:
        ObfuscaTuneError: something failed that should have worked.
    """
    began = time.perf_counter()
    scenes, client = [], ""
    for profile in settings.profiles:
        scene = Scene(profile)
        scenes.append(scene)
        with machines(folder / profile, MACHINES, isolated=settings.isolated) as made:
            with ExitStack() as resources:
                stage = Stage(profile, folder / profile, made, resources)
                epochs = 1 if settings.quick else EPOCHS[profile]
                story = Story(stage, scene, screen, epochs, settings.seed, learns=not settings.quick)
                story.play()
            client = story.client
        _search(stage, scene, screen)
    return Result(scenes, settings.isolated, client, environment(), time.perf_counter() - began)


def _search(stage: Stage, scene: Scene, screen: Screen) -> None:
    screen.doing("searching everything that left the enclave")
    searcher = search.make_search(stage)
    scene.canaries = dict(searcher.kinds)
    found = [*search.search_all(stage, searcher), *search.controls(stage, searcher)]
    if stage.profile == "private":
        here = replace(stage["mallory"], host=LOOPBACK, gateway=LOOPBACK, prefix=())
        found.append(search.unprotected_transcript(stage, here, searcher))
    for it in found:
        scene.searches.append(it)
        screen.searched(it)
    for path in (stage.network, *stage.transcripts()):  # hundreds of megabytes
        shutil.rmtree(path, ignore_errors=True)
