"""A window of steps recorded by torch.profiler, with the loop's phases by name: open the trace in ui.perfetto.dev."""

from pathlib import Path

from torch.profiler import profile, record_function, schedule

from kontext_train.training.config import ProfilerConfig


class Profiler:
    """Costs nothing where `config` records no step on this rank, or the loop begins beyond them."""

    def __init__(self, config: ProfilerConfig, folder: Path, rank: int) -> None:
        """folder: the run's."""
        self.config, self.wanted = config, config.steps > 0 and rank in config.ranks
        self.file = folder / "profile" / f"rank_{rank:04d}_step_{config.start_step:08d}.json.gz"
        self.phase: record_function | None = None
        self.profile: profile | None = None

    def start(self, step: int) -> None:
        """The loop begins, with so many updates made."""
        if self.wanted and step <= self.config.start_step:
            ahead = self.config.start_step - step
            warmup = min(ahead, 1)  # a step in which the profiler's own start is left out
            windows = schedule(wait=ahead - warmup, warmup=warmup, active=self.config.steps, repeat=1)
            self.profile = profile(schedule=windows, on_trace_ready=self._write)
            self.profile.start()

    def at(self, phase: str) -> None:
        """The loop leaves its last phase and comes to this one."""
        if self.profile is not None:
            self._leave_phase()
            self.phase = record_function(phase)
            self.phase.__enter__()

    def step(self) -> None:
        """The loop has made a step."""
        if self.profile is not None:
            self._leave_phase()
            self.profile.step()

    def close(self) -> None:
        """Writes what was recorded of a window that the run ends in."""
        if self.profile is not None:
            self._leave_phase()
            self.profile.stop()
            self.profile = None

    def _leave_phase(self) -> None:
        if self.phase is not None:
            self.phase.__exit__(None, None, None)
            self.phase = None

    def _write(self, recorded: profile) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.file))
