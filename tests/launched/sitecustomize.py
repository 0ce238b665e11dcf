"""Python runs this file at the start of every process that the tests launch, because its folder is on their PYTHONPATH.

It skips two slow imports of DeepSpeed that no test uses. DeepSpeed always imports its autotuner, which imports mlflow if it is
installed: half of the CPU time in which a launcher or rank starts, in hundreds of processes. DeepSpeed's engine checks whether
an optimizer is Muon, and Muon's module sets up torch's compiler: a sixth of a rank's start. All other code can import mlflow.
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
