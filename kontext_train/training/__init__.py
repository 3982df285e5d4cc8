"""Parts that the loop holds, each useful alone: optimizer, schedule, EMA, checkpoints, metrics, validation, signals."""
