"""Triton kernels: the sub-packages of the repository's `kernels/` folder.

`kernels/` has no `__init__.py` of its own, because the import name `kernels` belongs to another
package that transformers looks for. In a checkout its sub-packages are found through `__path__`; a
wheel has them here.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
