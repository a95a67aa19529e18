"""Network modules: pure functions of parameters, tokens and indices.

They are Flax Linen modules, and only this folder imports Flax. Elsewhere a
`Module` is something with `init(rng, *inputs) -> {'params': tree}`,
`apply({'params': tree}, *inputs) -> outputs` and `clone(**fields)`.
"""

from flax.linen import Module as Module
