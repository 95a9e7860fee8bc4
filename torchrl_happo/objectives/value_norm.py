r"""Value normalisation: the critic predicts normalised values, everything else sees real ones.

With running mean :math:`\mu` and scale :math:`\sigma` of the returns (TorchRL's
:class:`~torchrl.modules.ValueNorm` classes keep them), the critic's output :math:`\hat V` stands
for the value :math:`V = \sigma \hat V + \mu`. The advantage is estimated from :math:`V`; the critic
regresses on :math:`(R - \mu) / \sigma` (Yu et al., 2022, https://arxiv.org/abs/2103.01955).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_happo.transaction import Undo
from torchrl_happo.versions import ValueNorm

__all__ = ["MovedStatistics", "RealValues", "last_linear", "update_value_norm"]


class RealValues(TensorDictModuleBase):
    """A critic whose normalised predictions are put back on the scale of the returns.

    Args:
        critic (TensorDictModuleBase): predicts normalised values.
        value_norm (ValueNorm): knows their location and scale.
        value_key (NestedKey): where the critic writes them.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import RunningValueNorm
        >>> critic = TensorDictModule(nn.Identity(), in_keys=["state"], out_keys=["state_value"])
        >>> value_norm = RunningValueNorm(shape=1)
        >>> value_norm.update(torch.tensor([[9.0], [11.0]]))
        >>> values = RealValues(critic, value_norm, "state_value")
        >>> values(TensorDict({"state": torch.ones(1, 1)}, batch_size=[1]))["state_value"]
        tensor([[11.]])
    """

    def __init__(
        self, critic: TensorDictModuleBase, value_norm: ValueNorm, value_key: NestedKey
    ) -> None:
        super().__init__()
        self.critic = critic
        self.value_norm = value_norm
        self.value_key = value_key
        self.in_keys = critic.in_keys
        self.out_keys = critic.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes what the critic writes, the value denormalised."""
        tensordict = self.critic(tensordict)
        value = self.value_norm.denormalize(tensordict.get(self.value_key))
        return tensordict.set(self.value_key, value)


class MovedStatistics(NamedTuple):
    """What a batch of returns has done to the running statistics, and so to a critic's values.

    Attributes:
        undo (callable): puts statistics and critic back to where they were.
        gain (Tensor): with ``shift``, from what a prediction stood for to what it stands for now.
            Both are 1 and 0 where the critic's values have not moved.
        shift (Tensor): see ``gain``.
    """

    undo: Undo
    gain: Tensor
    shift: Tensor

    def restate(self, values: Tensor) -> Tensor:
        """Real values from before, as the same predictions stand for them now."""
        return values * self.gain + self.shift


@torch.no_grad()
def update_value_norm(
    value_norm: ValueNorm, value_target: Tensor, critic: nn.Module | None = None
) -> MovedStatistics:
    r"""Takes a batch of returns into the running statistics.

    With a critic, its last linear layer is rescaled so that the values it stands for do not jump
    when the statistics do (PopArt; van Hasselt et al., 2016, https://arxiv.org/abs/1602.07714):

    .. math::
        w \leftarrow \frac{\sigma}{\sigma'} w, \qquad
        b \leftarrow \frac{\sigma b + \mu - \mu'}{\sigma'}.

    The first batch is an exception: a critic that has never been fitted stands for no values worth
    keeping, and at their scale, which is next to zero while there are no statistics, its last layer
    would all but vanish. Returns by which the statistics would overflow are not taken in.

    Args:
        value_norm (ValueNorm): the statistics; modified.
        value_target (Tensor): the valid returns of the batch, ``[num_returns, 1]``. Where there is
            none, because nobody was active, nothing changes.
        critic (nn.Module, optional): the critic whose outputs are to be preserved.

    Returns:
        how to take it back, and what predictions from before stand for now.

    Raises:
        ValueError: if the critic does not end in a linear layer with a bias.
    """
    one, none = value_target.new_ones(1), value_target.new_zeros(1)
    if len(value_target) == 0:
        return MovedStatistics(lambda: None, one, none)
    before = copy.deepcopy(value_norm.state_dict())
    last = [] if critic is None else last_linear(critic)
    values = [parameter.clone() for parameter in last]
    zero = torch.zeros_like(value_target[:1])
    old_mean, old_scale = value_norm.denormalize(zero)[0], value_norm.scale().clone()
    value_norm.update(value_target)
    _keep_finite(value_norm, before)
    mean, scale = value_norm.denormalize(zero)[0], value_norm.scale()
    # The values stay if the predictions move, and the other way round.
    gain = scale / old_scale
    shift = mean - gain * old_mean
    if last:
        weight, bias = last
        # All of them are zero until something is taken in.
        known = torch.stack([statistic.any() for statistic in before.values()]).any()
        weight.mul_(torch.where(known, old_scale / scale, one))
        bias.copy_(torch.where(known, (bias * old_scale + old_mean - mean) / scale, bias))
        gain, shift = torch.where(known, one, gain), torch.where(known, none, shift)

    @torch.no_grad()
    def restore() -> None:
        value_norm.load_state_dict(before)
        for parameter, value in zip(last, values, strict=True):
            parameter.copy_(value)

    return MovedStatistics(restore, gain, shift)


def _keep_finite(value_norm: ValueNorm, before: dict[str, Tensor]) -> None:
    """Puts statistics back that are not finite, which they would stay; reads no value back."""
    after = value_norm.state_dict()
    finite = torch.stack([statistic.isfinite().all() for statistic in after.values()]).all()
    for name, statistic in after.items():
        statistic.copy_(torch.where(finite, statistic, before[name]))


def last_linear(critic: nn.Module, *, most_outputs: int | None = None) -> list[nn.Parameter]:
    """Weight and bias of the layer that writes the value, stacked or not.

    It is taken to be the one whose parameters are registered last.

    Args:
        critic (nn.Module): the critic.

    Keyword Args:
        most_outputs (int, optional): how many values it may write, by which a hidden layer that
            was registered last is told. Defaults to ``None``: any number.

    Raises:
        ValueError: if that is no linear layer with a bias, or has more outputs.
    """
    named = list(critic.named_parameters())[-2:]
    names = [name.rpartition(".")[2] for name, _ in named]
    shapes = [tuple(parameter.shape) for _, parameter in named]
    is_linear = names == ["weight", "bias"] and shapes[0][:-1] == shapes[1]
    if not is_linear or (most_outputs is not None and shapes[1][-1] > most_outputs):
        raise ValueError(
            "PopArt rescales the critic's last layer, which must be linear with a bias, but the "
            f"critic's last parameters are {[name for name, _ in named]} of shapes {shapes}; give "
            "it such a layer, registered after the others, for its values, or use value "
            "normalisation without popart."
        )
    return [parameter for _, parameter in named]
