"""A chain file: stages that follow one another, each from the weights the one before exported.

    stages:
      - {name: finetune, overrides: [stage=flow_finetune, run.steps=20000]}
      - {name: sharpen, overrides: [optimizer.lr=1e-6]}
      - {name: look, command: "$PYTHON -m kontext_train.sample checkpoint={export} prompt=... out={root}/look.png"}

A stage trains in run.dir/NAME with the options of the command line and then its own. Its student, and each frozen
network that it needs (a teacher), start from the last export, as weights.ROLE=…/export.safetensors, unless its own
options say from what; `weights: [teacher]` names the roles instead. A command may name {export} and {run} of the last
stage that trained, and {root}, the chain's run.dir; shell variables are written $NAME, since ${NAME} is OmegaConf's.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kontext_train.errors import ConfigError


@dataclass(slots=True)
class Stage:
    name: str = MISSING
    overrides: list[str] = field(default_factory=list)
    weights: list[str] | None = None  # roles; none is all that the stage needs and does not name itself
    command: str = ""


@dataclass(slots=True)
class Chain:
    stages: list[Stage] = field(default_factory=list)


def read_chain(file: Path) -> list[Stage]:
    """ConfigError, by stage, if it is no chain."""
    try:
        chain = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Chain), OmegaConf.load(file)))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        rule = f"is no chain: {str(error).splitlines()[0]}"
        raise ConfigError("--chain", str(file), rule, "launch/slurm/chain.py shows one") from error
    assert isinstance(chain, Chain)
    names = [stage.name for stage in chain.stages]
    for name in names:
        if not name or "/" in name or name.startswith(".") or name == "launch" or names.count(name) > 1:
            rule = "must be a name of its own, which a folder can have"
            raise ConfigError("stages.name", name, rule, "For example finetune")
    if not names or chain.stages[0].command:
        raise ConfigError("stages", names, "must begin with a stage that trains", "launch/slurm/chain.py shows one")
    for stage in chain.stages:
        if stage.command and stage.overrides:
            rule = "has a command, so its overrides would do nothing"
            raise ConfigError("stages.name", stage.name, rule, "Keep one of them")
    return chain.stages
