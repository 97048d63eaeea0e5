"""The exponential moving average of a network's weights: what is validated and written when a recipe asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages the floating-point state that training changes; everything else is the network's own.

    Args:
        network: whose trainable parameters and buffers are followed; on its device already.
        decay: of the average; in the first steps a smaller one, (1 + step) / (10 + step), so that it forgets the start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        named = network.named_parameters(remove_duplicate=False)
        followed = {name for name, parameter in named if parameter.requires_grad}
        followed |= {name for name, _ in network.named_buffers()}
        self.shadow: dict[str, Tensor] = {
            name: value.detach().clone()
            for name, value in network.state_dict().items()
            if name in followed and value.is_floating_point()
        }
        live = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers())
        self._live = [live[name] for name in self.shadow]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the network's weights after optimiser step ``step`` (0 for the first); one call for all."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), self._live, 1 - decay)

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's state with the averaged weights in it."""
        return {name: self.shadow.get(name, value) for name, value in network.state_dict().items()}

    @contextlib.contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """The network computes with the averaged weights inside the block and gets its own back, bit for bit."""
        state = network.state_dict()
        own = {name: state[name].detach().clone() for name in self.shadow}
        with torch.no_grad():
            for name, average in self.shadow.items():
                state[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    state[name].copy_(value)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over a saved average."""
        for name, average in self.shadow.items():
            average.copy_(shadow[name])
