"""Small random models of every architecture that people train, and the lengths at which each of them switches.

One table for `benchmarks/models.py`, which measures all of them, and for the tests, which take a dozen.
"""

from architectures.llama_like import LLAMA_LIKE
from architectures.newer import NEWER
from architectures.older import OLDER
from architectures.variant import VOCABULARY as VOCABULARY
from architectures.variant import Variant as Variant

VARIANTS = (*LLAMA_LIKE, *OLDER, *NEWER)
BY_NAME = {variant.name: variant for variant in VARIANTS}
