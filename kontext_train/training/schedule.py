"""Learning-rate factors as pure functions of the step."""

import math

from kontext_train.training.config import ScheduleConfig, ScheduleName


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Factor of the peak rate for update number `step` (from 0) of `steps`: linear warm-up, then the named course."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.name:
        case ScheduleName.constant:
            left = 1.0
        case ScheduleName.cosine:
            left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case ScheduleName.linear:
            left = 1.0 - min(1.0, progress)
        case _:
            raise AssertionError(config.name)
    return config.final_factor + (1 - config.final_factor) * left
