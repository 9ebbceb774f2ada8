"""A GPU that is not there: tensors that say "cuda:0" and whose values lie in host memory.

What kernels compute is shown elsewhere (cuda_host, ptx_machine). This shows the code around them:
which device each tensor is on, what makes the host wait, and what a captured graph may do. Errors
are those of a real device: operands on two devices, a wait where waiting is forbidden or while a
graph is captured, replays that read memory which was freed or that another graph has overwritten.
It knows one stream, so a missing wait between streams is not seen.

    from simulated_gpu import install
    install()      # for this process; `remove()` ends it

Read: tensor.py, device.py, capture.py, cuda_api.py.
"""

from simulated_gpu.install import install, remove

__all__ = ["install", "remove"]
