"""Profiles: how large the models are, what they read and for how long."""

from dataclasses import dataclass

from lcdist.claims.text import STDLIB, TextSettings


@dataclass(frozen=True)
class Profile:
    """Sizes of all jobs.

    Attributes:
        name: also of the configuration, `configs/claims/NAME.toml`.
        text: what the models read.
        adapting: overrides for the jobs that adapt a trained model.
        decides: whether the trainings are long enough for any claim to be decided.
    """

    name: str
    text: TextSettings
    adapting: tuple[str, ...]
    decides: bool = True


def _adapting(steps: int, rate: float) -> tuple[str, ...]:
    rates = (f"optim.lr={rate}", f"optim.min_lr={rate / 10}")
    return (f"train.steps={steps}", *rates, f"optim.warmup_steps={steps // 10}")


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("cpu", TextSettings(STDLIB, 8_000_000, 12_000, 36, 16, 1024), _adapting(150, 1e-3)),
        Profile(
            "gpu",
            # The standard library has some 30 MB: --text brings more.
            TextSettings(STDLIB, 200_000_000, 200_000, 60, 40, 8192),
            _adapting(200, 5e-4),
        ),
        Profile(
            "quick",
            TextSettings(STDLIB, 400_000, 200, 4, 8, 512),
            _adapting(2, 1e-3),
            decides=False,
        ),
    )
}
