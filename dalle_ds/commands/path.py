"""`dalle-ds path NAME`: print the path of a shipped file, as in `deepspeed $(dalle-ds path train_prior.sh)`."""

from dalle_ds import project_files
from dalle_ds.commands.settings import PathConfig
from dalle_ds.console import Outcome
from dalle_ds.errors import ConfigError


def run(config: PathConfig) -> Outcome:
    """Raises ConfigError where no such file is shipped."""
    if config.name is None:
        paths = [str(project_files.root() / name) for name in project_files.names()]
        return Outcome({"paths": paths}, text="\n".join(paths))
    path = project_files.find(config.name)
    if path is None:
        raise ConfigError(f"no shipped file {config.name!r}; there are {', '.join(project_files.names())}")
    return Outcome({"path": str(path)}, text=str(path))
