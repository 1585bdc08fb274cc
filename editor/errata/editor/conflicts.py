"""How far two deltas can speak against each other. Knows deltas only; what they say is for probes to find out."""

import torch
from jaxtyping import Float
from torch import Tensor

from errata.editor.delta import Delta


def key_overlap(first: Delta, second: Delta) -> float:
    """The largest cosine of a principal angle between the directions that both read, over the layers both change.

    A delta reads the row space of its factor `a`: a state outside of it passes unchanged. 0 where no layer is shared.
    """
    shared = first.layers.keys() & second.layers.keys()
    return max((_cosine(first.layers[i].a, second.layers[i].a) for i in shared), default=0.0)


def _cosine(first: Float[Tensor, "rank m"], second: Float[Tensor, "rank m"]) -> float:
    largest = torch.linalg.matrix_norm(_basis(first).T @ _basis(second), ord=2)
    return min(1.0, float(largest))


def _basis(rows: Float[Tensor, "rank m"]) -> Float[Tensor, "m independent"]:
    """An orthonormal basis of the row space, as columns, in float64; linearly dependent rows add nothing."""
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    kept = s > 1e-7 * s.max() if len(s) else s > 0
    basis: Tensor = vh[kept].T
    return basis
