"""Run at the start of every Python process that the tests launch (it is on their PYTHONPATH).

DeepSpeed imports its autotuner everywhere, and that imports mlflow if it can: half of the CPU time in which a launcher or rank
starts, in hundreds of processes. Its engine asks of every optimizer whether it is Muon, whose module sets up torch's compiler:
a sixth of a rank's start. Nothing here uses either; whoever else imports mlflow gets it.
"""

import sys
from types import SimpleNamespace


class _NoMlflowForTheAutotuner:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "mlflow":
            frame = sys._getframe(1)
            while frame is not None:
                if frame.f_globals.get("__name__") == "deepspeed.autotuning.autotuner":
                    raise ImportError(name)
                frame = frame.f_back


sys.meta_path.insert(0, _NoMlflowForTheAutotuner)
sys.modules["deepspeed.runtime.zero.muon.muon_optimizer"] = SimpleNamespace(MuonWithAuxAdam=type("Muon", (), {}))
