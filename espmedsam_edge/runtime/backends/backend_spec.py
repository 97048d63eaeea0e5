"""A backend as it is asked for: its name, and after colons what it is to run on and to compute in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from espmedsam_edge.errors import UserError, nearest

ARITHMETICS = ("fp32", "bf16", "fp16", "graph")
"""What a network's floating-point part can be computed in; "graph": each tensor as the graph has it."""

HINTS = ("latency", "throughput")
"""What counts: the time of each run, or how many end in a second where several are under way."""

LAYOUTS = ("nhwc",)
"""How ONNX Runtime's CUDA provider may lay convolutions' tensors out, beside its own way."""

_HINTED = ("openvino",)
_TAKES: dict[str, tuple[str, ...]] = {
    "openvino": ("device", "arithmetic"),
    "inductor": ("device", "arithmetic"),
    "onnxruntime": ("provider",),
    "onnxruntime-cuda": ("layout",),
    "triton": ("url",),
}
"""What may be said of a backend after its name; of those that are not here, nothing."""


@dataclass(frozen=True)
class BackendSpec:
    """A backend as it is asked for.

    Example:
        >>> BackendSpec.parse("openvino:GPU:bf16")
        BackendSpec(name='openvino', device='GPU', arithmetic='bf16', provider='')
        >>> str(BackendSpec("openvino", arithmetic="bf16"))
        'openvino:bf16'

    Attributes:
        name: a key of ``BACKENDS``, or "auto".
        device: of OpenVINO: CPU, GPU, GPU.1, NPU or AUTO; of Inductor: CPU or CUDA; empty: the default.
        arithmetic: of both: one of ``ARITHMETICS``; empty: the default.
        provider: of ONNX Runtime; empty: the default.
        hint: of OpenVINO: one of ``HINTS``; empty: latency.
        url: of Triton: the server's address.
        layout: of ONNX Runtime's CUDA provider: one of ``LAYOUTS``; empty: its own.
    """

    name: str
    device: str = ""
    arithmetic: str = ""
    provider: str = ""
    hint: str = ""
    url: str = ""
    layout: str = ""

    def __post_init__(self) -> None:
        takes = _TAKES.get(self.name, ())
        for word in ("device", "arithmetic", "provider", "url", "layout"):
            if getattr(self, word) and word not in takes:
                takers = " or ".join(name for name, words in _TAKES.items() if word in words)
                raise UserError(
                    f"the {word} '{getattr(self, word)}' was asked of backend {self.name}, which takes none.",
                    f"Name the backend, too: --backend {takers}",
                )
        if self.arithmetic and self.arithmetic not in ARITHMETICS:
            raise UserError(f"unknown arithmetic '{self.arithmetic}'.", nearest(self.arithmetic, ARITHMETICS))
        if self.layout and self.layout not in LAYOUTS:
            raise UserError(f"unknown layout '{self.layout}'.", nearest(self.layout, LAYOUTS))

    @classmethod
    def parse(cls, text: str) -> BackendSpec:
        """``NAME``, ``openvino:DEVICE:ARITHMETIC:HINT`` (or less), ``onnxruntime:PROVIDER``,
        ``onnxruntime-cuda:nhwc`` or ``triton:URL``.

        Raises:
            UserError: more words than the backend takes, or one that it does not know.
        """
        name, *words = text.split(":")
        takes = _TAKES.get(name, ())
        if "url" in takes:
            return cls(name, url=":".join(words))
        hint = words.pop() if name in _HINTED and words and words[-1] in HINTS else ""
        if len(words) > len(takes):
            more = f"more than {' and '.join(takes)}" if takes else "nothing"
            raise UserError(f"'{text}': after {name} {'may come no ' if takes else 'may come '}{more}.", _GRAMMAR)
        if "device" in takes and len(words) == 1 and words[0] in ARITHMETICS:
            return cls(name, arithmetic=words[0], hint=hint)
        return cls(name, **dict(zip(takes, words, strict=False)), hint=hint)

    def with_words(
        self, device: str | None, arithmetic: str | None, provider: str | None, url: str | None = None
    ) -> BackendSpec:
        """With what options said besides; None leaves a word as it is.

        Raises:
            UserError: one that the backend does not take, or that says something else than the name does.
        """
        words = {}
        for word, value in (("device", device), ("arithmetic", arithmetic), ("provider", provider), ("url", url)):
            named = getattr(self, word)
            if value and named and value != named:
                raise UserError(f"two values of {word}: '{named}' and '{value}'.", "Leave one of them out.")
            words[word] = value or named
        return replace(self, **words)

    def for_many(self) -> BackendSpec:
        """The same for many frames, several of which are under way at once."""
        return replace(self, hint="throughput") if self.name in _HINTED and not self.hint else self

    def __str__(self) -> str:
        words = (self.device, self.arithmetic, self.provider, self.hint, self.url, self.layout)
        return ":".join(filter(None, (self.name, *words)))


_GRAMMAR = "Such as onnxruntime, openvino:GPU, openvino:CPU:bf16."
