"""What every test needs: the scripts importable, and the devices there are."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    """Each test that asks for it runs on the CPU and, where there is one, on a GPU."""
    torch.manual_seed(0)
    return request.param
