"""Which t to train at, and the resolution shift that training and sampling share.

Larger images need more noise to be destroyed as much, so their times are shifted towards 1 (Esser et al. 2024, arXiv
2403.03206, section 5.3.2); FLUX makes the shift linear in the number of tokens.
"""

import torch
from torch import Tensor

from kontext_train.flow.config import ShiftConfig


def mu_for_tokens(tokens: Tensor, config: ShiftConfig) -> Tensor:
    """Log of the shift, for a number of target tokens."""
    slope = (config.max_mu - config.base_mu) / (config.max_tokens - config.base_tokens)
    return config.base_mu + slope * (tokens - config.base_tokens)


def shift(t: Tensor, mu: Tensor) -> Tensor:
    """t' = e^mu / (e^mu + 1/t - 1), written so that t = 0 and t = 1 stay what they are."""
    return torch.exp(mu) * t / (1 + (torch.exp(mu) - 1) * t)


def logit_normal(normal: Tensor, mu: Tensor) -> Tensor:
    """Training times from standard normals: a logit-normal with mean 0, shifted (which is one with mean mu)."""
    return torch.sigmoid(normal + mu)


def sampling_schedule(steps: int, mu: Tensor) -> Tensor:
    """[steps + 1, ...] float32 times from 1 to 0, shifted. mu may hold one value a sample."""
    t = torch.linspace(1, 0, steps + 1, device=mu.device).reshape(-1, *[1] * mu.ndim)
    return shift(t, mu)
