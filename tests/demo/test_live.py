"""The picture on a terminal."""

import io

from rich.console import Console

from obfuscatune.demo.terminal import live_curve
from obfuscatune.report.terminal import Curve
from obfuscatune.training.journal import Started
from obfuscatune.training.loop import StepEvent


def test_it_draws_while_training_and_fits_a_small_terminal():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=30, color_system=None)
    with live_curve(console, "plain", [Curve("protected", [3.0, 2.0, 1.0], "cyan")]) as see:
        see(Started(0, 3, None))
        for step, loss in enumerate((3.0, 2.0, 1.25), start=1):
            see(StepEvent(step=step, epoch=1, loss=loss, lr=0.1, grad_norm=1.0, tokens=10, seconds=0.1))
    shown = screen.getvalue()
    assert "━━ protected" in shown and "━━ plain" in shown
    assert "3/3" in shown and "loss 1.2500" in shown
    assert any("\u2801" <= character <= "\u28ff" for character in shown)
    assert "…" not in shown, "nothing is cut off at 80 columns"
