"""The blocks of a transformer over the agents of a team (Wen et al., 2022)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Cache", "DecoderBlock", "EncoderBlock"]

#: Keys and values of the agents decoded so far, one pair for each attention of each block.
Cache = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head attention by :func:`~torch.nn.functional.scaled_dot_product_attention`.

    Args:
        size (int): size of every token.
        num_heads (int): heads, which divide ``size``.
        device (torch.device or str, optional): device of the parameters. Defaults to torch's.

    Example:
        >>> attention = Attention(8, 2)
        >>> tokens = torch.randn(5, 3, 8)
        >>> attention(tokens, tokens, causal=True).shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, size: int, num_heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(size, size, device=device)
        self.key_value = nn.Linear(size, 2 * size, device=device)
        self.output = nn.Linear(size, size, device=device)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        *,
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
        present: Cache | None = None,
    ) -> Tensor:
        """Let tokens attend to others.

        Args:
            query (Tensor): the tokens that attend, ``[*B, q, size]``.
            context (Tensor): those that are attended to, ``[*B, k, size]``.

        Keyword Args:
            causal (bool): whether token ``i`` sees the tokens up to ``i`` alone. Defaults to
                ``False``.
            past (tuple of Tensor, optional): keys and values that stand before those of
                ``context``. Defaults to ``None``.
            present (list, optional): where to append all keys and values. Defaults to ``None``.

        Returns:
            a tensor ``[*B, q, size]``.
        """
        queries = self._heads(self.query(query))
        keys, values = map(self._heads, self.key_value(context).chunk(2, -1))
        if past is not None:
            keys, values = (torch.cat(pair, -2) for pair in zip(past, (keys, values), strict=True))
        if present is not None:
            present.append((keys, values))
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        return cast(Tensor, self.output(seen.transpose(-3, -2).flatten(-2)))

    def _heads(self, tokens: Tensor) -> Tensor:
        """Return tokens ``[*B, k, size]`` as ``[*B, num_heads, k, size / num_heads]``."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class EncoderBlock(nn.Module):
    """Attention among all agents and an MLP, each with a residual connection and a norm behind it.

    Args:
        size (int): size of every token.
        num_heads (int): heads of the attention.
        device (torch.device or str, optional): device of the parameters. Defaults to torch's.
    """

    def __init__(self, size: int, num_heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.attention = Attention(size, num_heads, device)
        self.mlp = _mlp(size, device)
        self.norms = nn.ModuleList(nn.LayerNorm(size, device=device) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the shape given, ``[*B, n_agents, size]``."""
        tokens = self.norms[0](tokens + self.attention(tokens, tokens))
        return cast(Tensor, self.norms[1](tokens + self.mlp(tokens)))


class DecoderBlock(nn.Module):
    """Causal attention among actions, then of observations to actions, then an MLP.

    The residual of the second attention is the encoded observation, as in the authors' code.

    Args:
        size (int): size of every token.
        num_heads (int): heads of the attention.
        device (torch.device or str, optional): device of the parameters. Defaults to torch's.
    """

    def __init__(self, size: int, num_heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.among_actions = Attention(size, num_heads, device)
        self.to_actions = Attention(size, num_heads, device)
        self.mlp = _mlp(size, device)
        self.norms = nn.ModuleList(nn.LayerNorm(size, device=device) for _ in range(3))

    def forward(
        self, tokens: Tensor, encoded: Tensor, *, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Decode all agents at once, or the next one.

        Args:
            tokens (Tensor): the action before that of each agent, ``[*B, k, size]``.
            encoded (Tensor): the encoded observation of each agent, ``[*B, k, size]``.

        Keyword Args:
            past (list of tuple of Tensor, optional): the block's keys and values of the agents
                decoded so far; there is then one token, of the next agent. Defaults to ``None``.

        Returns:
            tokens ``[*B, k, size]``, and the keys and values of all agents decoded.
        """
        causal, present = past is None, cast(Cache, [])
        first, second = (None, None) if past is None else past
        own = self.among_actions(tokens, tokens, causal=causal, past=first, present=present)
        tokens = self.norms[0](tokens + own)
        seen = self.to_actions(encoded, tokens, causal=causal, past=second, present=present)
        tokens = self.norms[1](encoded + seen)
        return self.norms[2](tokens + self.mlp(tokens)), present


def _mlp(size: int, device: torch.device | str | None) -> nn.Sequential:
    hidden = nn.Linear(size, size, device=device)
    return nn.Sequential(hidden, nn.GELU(), nn.Linear(size, size, device=device))
