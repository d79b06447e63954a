"""A file per command: its signature, then one call. Heavy imports happen inside the bodies."""

from .bench import bench
from .compress import compress
from .demo import demo
from .eval import eval_
from .export import export
from .finetune import finetune
from .generate import generate
from .inspect import inspect
from .join import join
from .push import push
from .refine import refine
from .verify import verify

COMMANDS = (compress, join, refine, finetune, inspect, generate, eval_, bench, export, verify, push, demo)
"""In the order in which `losparse --help` lists them."""
