"""The first product of `losses.exponentials` by QuACK, an optional package for Hopper cards.

Install it with `pip install quack-kernels nvidia-cutlass-dsl[cu13]==4.7.1`. QuACK's own loss is not used, see
`losses.exponentials`. Imported on first use.
"""

from __future__ import annotations

from typing import Any

from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce
from torch import Tensor

LOG2E = 1.4426950408889634


@gemm_epilogue(ops={"offset": ColVecLoad("offset")}, reduces={"sums": ColVecReduce("sums")})
def shifted_exponential(acc: Any, offset: Any) -> dict[str, Any]:
    """exp2(log2(e) · logit − offset), stored in the dtype of the output, and its row sums of a tile in float32."""
    e = pexp2(acc * LOG2E - offset)
    return {"D": e, "sums": e}


def exponentials(z_MR: Tensor, A_VR: Tensor, E_MV: Tensor, offset_M: Tensor, sums_MT: Tensor, width: int) -> None:
    """Write E = exp2(log2(e) z Aᵀ − offset) and the row sums of its tiles of `width` entries, which divides V."""
    shifted_exponential.gemm(
        z_MR,
        A_VR,
        E_MV,
        epi_args=dict(offset=offset_M.unsqueeze(0), sums=sums_MT),
        tile_M=128,
        tile_N=width,
        cluster_M=2,
        cluster_N=1,
        pingpong=width <= 208,
    )
