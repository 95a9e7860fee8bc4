"""The reference's networks and recorded batches, as this library takes them.

The files under ``tests/data`` hold what one training iteration of the reference implementation
(PKU-MARL/HARL, commit d539bad) read and wrote on a small synthetic batch, in float64.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, MaskedCategorical, ProbabilisticActor

DATA = Path(__file__).parent / "data"


class Trunk(nn.Module):
    """Layer norm of the input, then linear, ReLU and layer norm for each hidden layer."""

    def __init__(self, num_inputs: int, hidden: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size_in, size_out in zip([num_inputs, *hidden], hidden, strict=False):
            layers += [nn.Linear(size_in, size_out), nn.ReLU(), nn.LayerNorm(size_out)]
        self.feature_norm = nn.LayerNorm(num_inputs)
        self.mlp = nn.ModuleDict({"fc": nn.Sequential(*layers)})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["fc"](self.feature_norm(x))


class Gaussian(nn.Module):
    def __init__(self, size: int, num_actions: int) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.ones(num_actions))
        self.fc_mean = nn.Linear(size, num_actions)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.fc_mean(x)
        return mean, (self.log_std.sigmoid() * 0.5).expand_as(mean)


class Logits(nn.Module):
    def __init__(self, size: int, num_actions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, num_actions)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Network(nn.Module):
    """Named as in the reference, so that its parameters load by name."""

    def __init__(self, num_inputs: int, hidden: list[int], num_actions: int, kind: str) -> None:
        super().__init__()
        head = Gaussian if kind == "cont" else Logits
        self.base = Trunk(num_inputs, hidden)
        self.act = nn.ModuleDict({"action_out": head(hidden[-1], num_actions)})

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.act["action_out"](self.base(x))


def load(case: str) -> dict:
    return torch.load(DATA / f"{case}.pt", weights_only=True)


def make_actors(golden: dict) -> dict[str, ProbabilisticActor]:
    """One actor for each agent, a group of its own, with the recorded initial parameters."""
    actors = {}
    for i, (obs_dim, act_dim) in enumerate(
        zip(golden["obs_dims"], golden["act_dims"], strict=True)
    ):
        group = f"agent_{i}"
        net = Network(obs_dim, golden["config"]["hidden_sizes"], act_dim, golden["kind"]).double()
        net.load_state_dict(golden["inputs"]["actor_init"][i])
        continuous = golden["kind"] == "cont"
        names = ["loc", "scale"] if continuous else ["logits"]
        keys = [(group, name) for name in names]
        in_keys = dict(zip(names, keys, strict=True))
        if not continuous:
            in_keys["mask"] = (group, "action_mask")
        actors[group] = ProbabilisticActor(
            TensorDictModule(net, in_keys=[(group, "observation")], out_keys=keys),
            in_keys=in_keys,
            out_keys=[(group, "action")],
            distribution_class=IndependentNormal if continuous else MaskedCategorical,
            return_log_prob=True,
        )
    return actors


def make_batch(golden: dict) -> TensorDict:
    """The recorded batch, ``[time, num_envs]``, with the raw advantage in it."""
    inputs = golden["inputs"]
    shape = inputs["advantages_raw"].shape[:2]
    batch = TensorDict({"advantage": inputs["advantages_raw"]}, shape)
    for i, observation in enumerate(inputs["obs"]):
        action, log_prob = inputs["actions"][i], inputs["old_log_probs"][i]
        group = TensorDict({"observation": observation, "action_log_prob": log_prob.sum(-1)}, shape)
        group["active"] = inputs["active_masks"][i].squeeze(-1).bool()
        if golden["kind"] == "cont":
            group["action"] = action
        else:
            group["action"] = action.squeeze(-1).long()
            group["action_mask"] = inputs["available_actions"][i].bool()
        batch[f"agent_{i}"] = group
    return batch


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest number of the reference."""
    error = (value.detach() - reference).abs().max()
    return float(error / reference.abs().max().clamp_min(1e-300))
