"""`dalle-ds path NAME`: print the path of a shipped file, as in `deepspeed $(dalle-ds path train_prior.sh)`."""

from pathlib import Path

from dalle_ds import project_files
from dalle_ds.commands.settings import PathConfig
from dalle_ds.console import Outcome
from dalle_ds.errors import ConfigError
from dalle_ds.hints import did_you_mean


def run(config: PathConfig) -> Outcome:
    """Raises ConfigError where no such file is shipped."""
    if config.name is None:
        paths = [str(project_files.root() / name) for name in project_files.names()]
        return Outcome({"paths": paths}, text="\n".join(paths))
    path = project_files.find(config.name)
    if path is None:
        known = project_files.names()
        hint = did_you_mean(config.name, [*(Path(name).name for name in known), *known])
        raise ConfigError(f"no shipped file {config.name!r}; there are {', '.join(known)}{hint}")
    return Outcome({"path": str(path)}, text=str(path))
