"""Compiled steps: one function of (weights, state, data) through :func:`torch.compile`.

:mod:`.code` compiles such functions once for all agents of one architecture, and decides what runs
as it is; :mod:`.layout` passes tensordicts as lists of tensors. :mod:`.first_order` makes one
function of a first-order step, :mod:`.trust_region` three of a trust region. :mod:`.cuda_graphs`
replays functions of tensors from CUDA graphs, compiled or not.
"""
