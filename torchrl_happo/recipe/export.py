"""The policy of one agent as a program that needs neither TorchRL nor this library."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.trained import AgentPolicy

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "weights": ".pt"}


def export_agent(agent: AgentPolicy, target: Path) -> Path:
    """Write one agent's policy: the ending of the file says as what.

    ``.onnx`` is an ONNX model, ``.pt2`` a program of ``torch.export``, ``.pt`` the weights alone
    (a state dict). The first dimension of all inputs and outputs is the batch, of any size.

    Args:
        agent (AgentPolicy): of :attr:`~torchrl_happo.recipe.trained.Trained.agents`.
        target (Path): the file to write.

    Raises:
        ConfigError: if the ending is another one, or a package is missing.
    """
    if target.suffix not in FORMATS.values():
        raise ConfigError(
            f"The output is {target.name!r}, but must end in {', '.join(FORMATS.values())}."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    agent = agent.eval()
    if target.suffix == ".pt":
        torch.save(agent.actor.state_dict(), target)
        return target
    program = torch.export.export(agent, **_arguments(agent), strict=False)
    if target.suffix == ".pt2":
        torch.export.save(program, target)
        return target
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"An ONNX model needs {' and '.join(missing)}: pip install 'torchrl_happo[export]'."
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses operators nobody asked for
    torch.onnx.export(
        program,
        f=target,
        input_names=agent.in_names,
        output_names=agent.out_names,
        external_data=False,
        verbose=False,
    )
    return target


def _arguments(agent: AgentPolicy) -> dict[str, Any]:
    """Return example inputs of two environments, and that there may be any number of them."""
    batch = torch.export.Dim("batch", min=1)
    inputs = tuple(torch.cat([value, value]).clone() for value in agent.example)
    return {"args": inputs, "dynamic_shapes": {"inputs": tuple({0: batch} for _ in inputs)}}
