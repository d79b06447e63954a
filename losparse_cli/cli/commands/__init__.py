"""A file per command: its signature, then one call. Heavy imports happen inside the bodies."""

# In the order in which `losparse --help` lists them.
from . import compress  # isort: skip
from . import refine  # isort: skip
from . import finetune  # isort: skip
from . import inspect  # isort: skip
from . import eval  # isort: skip
from . import bench  # isort: skip
from . import export  # isort: skip
from . import verify  # isort: skip
from . import push  # isort: skip
from . import demo  # isort: skip

__all__ = ["bench", "compress", "demo", "eval", "export", "finetune", "inspect", "push", "refine", "verify"]
