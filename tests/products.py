"""What tests of kernels measure products by."""

from __future__ import annotations

import pytest
import torch

from losparse_cli.kernels import native

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
