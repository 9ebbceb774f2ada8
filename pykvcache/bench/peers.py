"""Other attention that the kernel benchmark times, where it is installed and works on the device.

A peer is a function of a `kernels.Workload` that returns contenders by name, or raises Missing with
one line that says why it cannot run. All read the contiguous K and V of the workload, or the same
blocks. What they return is checked like everything else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pykvcache.bench.cases import FLOAT8
from pykvcache.bench.timing import Contender, Missing, one_line

if TYPE_CHECKING:
    from pykvcache.bench.kernels import Workload

FLASHINFER_PAGE = 16
FLASHINFER_WORKSPACE = 128 * 2**20
SDPA_BACKENDS = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}


def flex(workload: Workload) -> dict[str, Contender]:
    """FlexAttention, compiled; causal by a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, copies = workload.case, workload.copies
    if case.phase == "chunk":
        raise Missing("is measured for decode and prefill only")
    mask: Any = None
    if case.phase == "prefill":

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= k

        size = case.length
        mask = create_block_mask(causal, None, None, size, size, device=str(workload.device))
    # Past the compiler's limit of variants the call would run unfused, with all scores in memory.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(call: int) -> Tensor:
        copy = (call + copies // 3) % copies
        with torch.no_grad():
            found: Tensor = compiled(
                workload.q,
                workload.k[copy],
                workload.v[copy],
                block_mask=mask,
                enable_gqa=case.heads.group > 1,
            )
        return found

    try:
        run(0)
    except Exception as error:  # a compiler's failure has any type
        raise Missing(f"does not run here: {one_line(error)}") from error
    return {"flex": run}


def sdpa_backends(workload: Workload) -> dict[str, Contender]:
    """SDPA with FlashAttention and with cuDNN, each by itself; on a GPU."""
    if workload.device.type != "cuda":
        raise Missing("needs a GPU")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: dict[str, Contender] = {}
    for name, backend in SDPA_BACKENDS.items():
        chosen = getattr(SDPBackend, backend)

        def run(call: int, chosen: Any = chosen) -> Tensor:
            copy = (call + workload.copies // 3) % workload.copies
            with sdpa_kernel(chosen):
                return scaled_dot_product_attention(
                    workload.q,
                    workload.k[copy],
                    workload.v[copy],
                    is_causal=workload.case.phase == "prefill",
                    enable_gqa=workload.case.heads.group > 1,
                )

        try:
            run(0)
        except RuntimeError:
            continue  # not for this dtype, head dim or grouping
        found[name] = run
    if not found:
        raise Missing("neither takes this case")
    return found


def flashinfer(workload: Workload) -> dict[str, Contender]:
    """FlashInfer over pages of FLASHINFER_PAGE tokens, one planned wrapper a copy; on a GPU.

    Decode is that of its tensor cores, which is the faster one for grouped heads.
    """
    if workload.device.type != "cuda":
        raise Missing("needs a GPU")
    if importlib.util.find_spec("flashinfer") is None:
        raise Missing("is not installed")
    if workload.case.dtype == torch.float32:
        raise Missing("takes no float32")
    try:
        import flashinfer as library

        run = _plan_flashinfer(library, workload)
        run(0)
    except Exception as error:  # no kernel for this GPU, no compiler, another version's signature
        raise Missing(f"does not run here: {one_line(error)}") from error
    return {"flashinfer": run}


def _plan_flashinfer(library: Any, workload: Workload) -> Contender:
    """A planned wrapper for each copy; they run one after the other and share a workspace."""
    case, heads, device = workload.case, workload.case.heads, workload.device
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    order, counts = workload.shuffled_blocks(FLASHINFER_PAGE)
    shape = (order.numel(), heads.num_kv_heads, FLASHINFER_PAGE, heads.head_dim)
    k_cache, v_cache = (torch.zeros(shape, dtype=case.dtype, device=device) for _ in range(2))
    workload.fill(k_cache, v_cache, order)
    indptr = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    last = [(length - 1) % FLASHINFER_PAGE + 1 for length in case.lengths]
    last_page_len = torch.tensor(last, dtype=torch.int32, device=device)
    sizes = (heads.num_heads, heads.num_kv_heads, heads.head_dim, FLASHINFER_PAGE)
    dtypes = {"q_data_type": case.dtype, "kv_data_type": case.dtype}
    wrappers = []
    for pages in order.to(device):
        if case.phase == "decode":
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=True
            )
            wrapper.plan(indptr, pages, last_page_len, *sizes, **dtypes)
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            starts = workload.cu_seqlens_q
            wrapper.plan(starts, indptr, pages, last_page_len, *sizes, causal=True, **dtypes)
        wrappers.append(wrapper)

    def run(call: int) -> Tensor:
        found: Tensor = wrappers[call % workload.copies].run(workload.packed_q, (k_cache, v_cache))
        return found

    return run


def transformers(workload: Workload) -> dict[str, Contender]:
    """transformers' paged attention, as its continuous batching calls it."""
    if importlib.util.find_spec("transformers") is None:
        raise Missing("is not installed")
    from pykvcache.bench import transformers_paged

    try:
        return {"transformers paged": transformers_paged.paged(workload)}
    except Missing:
        raise
    except Exception as error:  # what it uses is private there and changes between versions
        raise Missing(f"does not run here: {one_line(error)}") from error


PEERS: dict[str, Callable[[Workload], dict[str, Contender]]] = {
    "flex": flex,
    "sdpa-backends": sdpa_backends,
    "flashinfer": flashinfer,
    "transformers": transformers,
}
MIXED_PEERS = ("flashinfer",)


def find_peer(name: str, workload: Workload) -> dict[str, Contender]:
    """What PEERS[name] returns.

    Raises:
        Missing: it cannot run here, or not on this case.
    """
    if workload.case.dtype == FLOAT8:
        raise Missing("takes no float8 with a scale for each head")
    if workload.case.mixed and name not in MIXED_PEERS:
        raise Missing("takes rows of one length only")
    return PEERS[name](workload)
