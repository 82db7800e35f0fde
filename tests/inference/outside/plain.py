"""A runtime of another distribution: PyTorch's own file behind a line of text."""

import io
from dataclasses import dataclass, field

import torch

from dyntune.core.files import write_atomically
from dyntune.inference.export.runtimes.base import Runner, Runtime, Session


@dataclass(frozen=True)
class Plain(Runtime):
    """PyTorch's own file behind a line of text.

    Args:
        stamp: the text.
    """

    title = "Plain"
    file = "model.plain"
    writes_with = runs_with = ("torch", "plain")
    install = "plain"
    runner = Runner(
        "plain",
        'plain.Plain().open(FOLDER / "model.plain", None)',
        "model.compute(plain.torch.from_numpy(images))[0].numpy()",
    )
    needs_trust = True

    stamp: str = field(default="none", metadata={"help": "Text of the first line."})

    def write(self, program, path, spec):
        def save(temporary):
            with temporary.open("wb") as file:
                file.write(f"{self.stamp}\n".encode())
                content = io.BytesIO()
                torch.export.save(program, content)
                file.write(content.getvalue())

        write_atomically(path, save)

    def open(self, path, threads):
        return PlainSession(torch.export.load(io.BytesIO(path.read_bytes().partition(b"\n")[2])).module())


class PlainSession(Session):
    def __init__(self, module):
        self.module = module

    @torch.inference_mode()
    def compute(self, images):
        logits, *masks = self.module(images)
        return logits, masks[0] if masks else None
