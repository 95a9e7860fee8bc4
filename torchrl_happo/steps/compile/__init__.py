"""Compiled steps: the same numbers from fewer and longer kernels.

A step is written once, in Python that speaks of tensordicts, modules and distributions. It becomes
compiled code in four stages, a module for each:

1. :mod:`.flat` lays networks and tensordicts out as lists of tensors, and back.
2. :mod:`.graphs` runs the step once on symbolic tensors, which leaves a graph of tensor
   operations, backward pass included, and gives that graph to :func:`torch.compile`. Agents of one
   architecture leave the same graph and share its code. Dynamo can trace a first-order step as well
   (``benchmarks/compiler.py`` compares both), but then checks the Python it has seen before each
   call, leaves stacked networks with other tensors than their own, and cannot cut a graph in parts.
3. :mod:`.compiled` makes such a function of a first-order step, Adam included;
   :mod:`.compiled_model` of a trust region, whose graph :mod:`.cut` cuts: once a batch, once an
   iteration of conjugate gradient, once a try of the line search.
4. :mod:`.cuda_graphs` replays such functions from CUDA graphs.

:mod:`.code` decides what has to be compiled anew, and what runs as it is with one warning.
"""
