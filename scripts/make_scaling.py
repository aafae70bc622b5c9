"""Writes the tables of docs/scaling.md: memory and traffic of a run, computed from the shapes of LLaMA.

    python -m scripts.make_scaling

Arithmetic only: nothing here was measured on a GPU. Its test compares the counts with real modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
LENGTH, VOCABULARY = 10, 32_000
MB, GB = 1e6, 1e9


@dataclass(frozen=True)
class Shape:
    """A LLaMA with as many key as query heads, its topmost L = N - 2 layers adapted.

    Args:
        name: of the size.
        width: C.
        mlp: F.
        layers: N.
        heads: H.
    """

    name: str
    width: int
    mlp: int
    layers: int
    heads: int

    @property
    def adapted(self) -> int:
        """L."""
        return self.layers - 2

    @property
    def blocks(self) -> int:
        """Parameters of the blocks: four projections, three of the MLP, two norms each."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.mlp + 2 * self.width)

    @property
    def outside(self) -> int:
        """Parameters outside the blocks: embeddings, output layer, last norm."""
        return 2 * VOCABULARY * self.width + self.width

    @property
    def adapter(self) -> int:
        """Trained parameters: K prompts and H gates in each of L layers."""
        return self.adapted * (LENGTH * self.width + self.heads)

    @property
    def per_token_and_layer(self) -> int:
        """Bytes per token that one adapted bfloat16 layer keeps for the backward pass.

        The input of either norm in float32 (2 x 4C); query, key, value and the attention's two outputs (5 x 2C); in the
        MLP the gate before and after its activation, and its factor (3 x 2F). Frozen linear layers keep
        nothing, since their weights get no gradient.
        """
        return 2 * 4 * self.width + 5 * 2 * self.width + 3 * 2 * self.mlp

    @property
    def activations(self) -> int:
        """Bytes kept per token without checkpointing: layers below the first adapted one keep nothing."""
        return self.adapted * self.per_token_and_layer

    @property
    def checkpointed(self) -> int:
        """Bytes per token with checkpointing: every layer's bfloat16 input, and one layer while it is recomputed."""
        return self.layers * 2 * self.width + self.per_token_and_layer

    def weights(self, bits: int) -> float:
        """Bytes of the host with the matrices of its blocks in ``bits`` bits, and the rest in bfloat16.

        8: LLM.int8(), a float32 scale for each row. 4: NF4 in blocks of 64 with double quantisation, that is an 8-bit
        scale for each block and a float32 for each 256 of these.
        """
        matrices = self.layers * (4 * self.width**2 + 3 * self.width * self.mlp)
        rows = self.layers * (5 * self.width + 2 * self.mlp)
        rest = 2 * (self.blocks + self.outside - matrices)
        return rest + {16: 2 * matrices, 8: matrices + 4 * rows, 4: matrices * (1 / 2 + 1 / 64 + 4 / (64 * 256))}[bits]

    @property
    def rounded_inputs(self) -> int:
        """Further bytes per token that LLM.int8() keeps, with checkpointing or without: the inputs of the matrices."""
        return self.adapted * 2 * (3 * self.width + self.mlp)

    def on_device(self, weights: float, tokens: int = 4096, *, beside: int = 0) -> float:
        """Bytes on a GPU that trains with checkpointing: weights, adapter with its optimizer, activations."""
        return weights + 16 * self.adapter + tokens * (self.checkpointed + beside)

    @property
    def staying(self) -> float:
        """Bytes of weights on the GPU with offloading: all but the blocks, and the block being recomputed."""
        return 2 * (self.outside + self.blocks / self.layers)

    @property
    def offloaded(self) -> float:
        """Bytes copied to the GPU per micro-batch: the blocks' matrices forward, the adapted ones again backward.

        In each adapted layer the key and value projections are copied twice a pass, for the words and for the prompts.
        """
        once = 2 * self.blocks * (1 + self.adapted / self.layers)
        return once + 2 * self.adapted * 2 * 2 * self.width**2

    def gathered(self, processes: int) -> float:
        """Bytes that one process receives per micro-batch under FSDP2: all blocks forward, the adapted ones back."""
        passes = 1 + self.adapted / self.layers
        return passes * 2 * self.blocks * (processes - 1) / processes


SHAPES = (
    Shape("7B", 4096, 11008, 32, 32),
    Shape("13B", 5120, 13824, 40, 40),
    Shape("65B", 8192, 22016, 80, 64),
)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory() -> str:
    """The host's weights, and the trained parameters."""
    head = ["Model", "Parameters", "bfloat16", "8 bits", "4 bits", "Adapter", "x 16 bytes"]
    rows = []
    for shape in SHAPES:
        total = shape.blocks + shape.outside
        weights = [f"{shape.weights(bits) / GB:.1f} GB" for bits in (16, 8, 4)]
        rows.append([shape.name, f"{total:,}", *weights, f"{shape.adapter:,}", f"{16 * shape.adapter / MB:.1f} MB"])
    return _table(head, rows)


def one_gpu() -> str:
    """Memory of a GPU that trains on micro-batches of 4,096 tokens, and the bytes that offloading copies."""
    head = ["Model", "bfloat16", "bnb-8bit", "torchao-int8", "bnb-4bit", "offload", "moved per micro-batch"]
    rows = []
    for shape in SHAPES:
        eight = shape.weights(8)
        held = [
            shape.on_device(shape.weights(16)),
            shape.on_device(eight, beside=shape.rounded_inputs),
            shape.on_device(eight + 2 * shape.blocks / shape.layers),  # bfloat16 copies of the block being recomputed
            shape.on_device(shape.weights(4)),
            shape.on_device(shape.staying),
            shape.offloaded,
        ]
        rows.append([shape.name, *(f"{number / GB:.1f} GB" for number in held)])
    return _table(head, rows)


def activations() -> str:
    """Activations per token."""
    head = ["Model", "kept per token", "with checkpointing", "of 4,096 tokens", "with checkpointing"]
    rows = [
        [
            shape.name,
            f"{shape.activations / MB:.2f} MB",
            f"{shape.checkpointed / MB:.2f} MB",
            f"{4096 * shape.activations / GB:.1f} GB",
            f"{4096 * shape.checkpointed / GB:.1f} GB",
        ]
        for shape in SHAPES
    ]
    return _table(head, rows)


def sharded() -> str:
    """Weights on each process under FSDP2: its shard of the blocks, two gathered blocks, and everything else."""
    head = ["Model", "DDP", "FSDP2 over 8", "over 32", "received per micro-batch (8)"]
    rows = []
    for shape in SHAPES:
        each = [2 * (shape.blocks / world + 2 * shape.blocks / shape.layers + shape.outside) / GB for world in (8, 32)]
        full = 2 * (shape.blocks + shape.outside) / GB
        rows.append(
            [shape.name, f"{full:.1f} GB", *(f"{shard:.1f} GB" for shard in each), f"{shape.gathered(8) / GB:.1f} GB"]
        )
    return _table(head, rows)


def traffic() -> str:
    """Gradients: one all-reduce per step."""
    head = ["Model", "Adapter", "all-reduce per step", "sent by each of 8 (ring)"]
    rows = [
        [
            shape.name,
            f"{shape.adapter:,}",
            f"{4 * shape.adapter:,} bytes",
            f"{2 * 7 / 8 * 4 * shape.adapter / MB:.1f} MB",
        ]
        for shape in SHAPES
    ]
    return _table(head, rows)


TABLES = {"memory": memory, "one-gpu": one_gpu, "activations": activations, "sharded": sharded, "traffic": traffic}


def render(text: str) -> str:
    """The document with its tables rewritten."""
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- end -->"
        text, found = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{DOCUMENT} must hold the table {name!r} once; found {found}.")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
