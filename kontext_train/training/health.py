"""What a run does about trouble and tells of itself, as the loop holds it. docs/health.md"""

from dataclasses import dataclass

from kontext_train.training.heartbeat import Heartbeat
from kontext_train.training.profiling import Profiler
from kontext_train.training.stability import Stability
from kontext_train.training.stragglers import Stragglers


@dataclass(slots=True)
class Health:
    stability: Stability
    stragglers: Stragglers
    heartbeat: Heartbeat
    profiler: Profiler

    def at(self, step: int, phase: str) -> None:
        """The loop comes to a phase. step: updates made so far."""
        self.heartbeat.at(step, phase)
        self.profiler.at(phase)

    def metrics(self) -> dict[str, float]:
        """At a log step; every rank must call it."""
        return self.stability.metrics() | self.stragglers.metrics()
