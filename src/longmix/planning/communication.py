"""The bytes of buffers for gathering and exchange, at each moment of a training step."""

from longmix.planning.dry_run import Part, Rehearsal


class Buffers:
    """Buffers that are as large at every moment, as those of DDP: a second copy of the gradients.

    Args:
        always: their bytes.

    Attributes:
        always: as given; what the optimizer's step finds.
        loss: what the turning point finds.
        embedding: what the last part of the backward pass finds.
    """

    def __init__(self, always: int) -> None:
        self.always = self.loss = self.embedding = always

    def gather(self, index: int) -> int:
        """Before a layer's forward pass."""
        return self.always

    def forward(self, index: int) -> int:
        """During a layer's forward pass."""
        return self.always

    def gather_again(self, index: int) -> int:
        """Before a layer's backward pass."""
        return self.always

    def backward(self, index: int) -> int:
        """During a layer's backward pass."""
        return self.always

    def exchange(self, index: int) -> int:
        """After a layer's backward pass."""
        return self.always


class ShardedBuffers(Buffers):
    """Those of FSDP2, which gathers the ends once for both passes, and each layer for either pass.

    What is gathered arrives in a buffer and is copied to the weights; the buffer lasts until the next layer's copy in
    the forward pass. In the backward pass the next layer is on its way while one is computed, and what a layer sent of
    its gradients lasts until the next layer sends its own. Where some weights travel rounded, what arrives of a module
    and what is sent have memory of their own besides.

    Args:
        rehearsal: of the parts.
        processes: over which they are divided.
        size: bytes of a number of the gathered weights.
        reduced: bytes of a number of the gradients that are sent.
    """

    def __init__(self, rehearsal: Rehearsal, processes: int, size: int, reduced: int) -> None:
        super().__init__(0)
        ends, layers = rehearsal.ends, rehearsal.layers
        self._ends = size * ends.parameters
        self._layers = [size * part.parameters for part in layers]
        self._sent = [reduced * part.parameters for part in layers]
        self._travelling = [_travelling(part, processes) for part in layers]
        self._processes = processes
        self.loss = self._ends + self._layers[-1]
        own = reduced * ends.parameters
        self.embedding = max(self._ends + self._sent[0], own + own // processes)

    def gather(self, index: int) -> int:
        """The layer on its way and in its place, or on its way with the buffer of the one before."""
        own = self._layers[index]
        earlier = self._layers[index - 1] if index > 0 else self._ends
        return self._ends + own + max(own, earlier + self._travelling[index])

    def forward(self, index: int) -> int:
        """The layer's weights, and the buffer in which they came."""
        return self._ends + 2 * self._layers[index]

    def gather_again(self, index: int) -> int:
        """The layer on its way and in its place, then the next one on its way."""
        own = self._layers[index]
        following = self._layers[index - 1] + self._travelling[index - 1] if index > 0 else 0
        return self._ends + self._leaving(index) + own + max(own, following)

    def backward(self, index: int) -> int:
        """The layer's weights, the next layer's on their way, and what the layer before sent."""
        following = self._layers[index - 1] if index > 0 else 0
        return self._ends + self._leaving(index) + self._layers[index] + following

    def exchange(self, index: int) -> int:
        """The layer's gradients, once as they were made and once to be sent, and this process's share of the sum."""
        following = self._layers[index - 1] if index > 0 else 0
        return self._ends + following + 2 * self._sent[index] + self._sent[index] // self._processes

    def _leaving(self, index: int) -> int:
        return self._sent[index + 1] if index + 1 < len(self._sent) else 0


def _travelling(part: Part, processes: int) -> int:
    """Bytes of a layer's weights on their way, if some of them are rounded."""
    return part.gathered + part.gathered // processes if part.rounded else 0
