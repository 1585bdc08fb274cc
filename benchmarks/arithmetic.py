"""What models of 7, 13 and 70 billion parameters need: memory, products and time of a trace and of an edit.

    python benchmarks/arithmetic.py

prints the tables of docs/large-models.md, which a test holds to it; another test holds the counts of products to what
torch counts on a small model. A product of an (a × b) and a (b × c) matrix is 2·a·b·c operations; norms, softmax and
activations are not counted. Times are operations over a rate that is assumed (`Device`): give your own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder: width d, inner width m, grouped keys and values; `image_tokens` before the text, and the parameters
    of the tower and the projector that make them.
    """

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    image_tokens: int = 0
    tower_parameters: int = 0

    @property
    def layer_parameters(self) -> int:
        """Of a layer's products: q and o, k and v, gate, up and down."""
        d, kv = self.width, self.width * self.kv_heads // self.heads
        return 2 * d * d + 2 * d * kv + 3 * d * self.inner

    @property
    def linear_parameters(self) -> int:
        """Of all layers' products: what quantisation makes smaller."""
        return self.layers * self.layer_parameters

    @property
    def other_parameters(self) -> int:
        """Embeddings, head, tower and projector. Norms are left out."""
        return 2 * self.width * self.vocabulary + self.tower_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Tokens of a prompt before the constraint (the image's included), from there to its end, and of the answer with
    its end. `constraint` of the traced ones are the constraint's own.
    """

    before: int
    traced: int
    answer: int
    constraint: int = 2

    @property
    def length(self) -> int:
        """Tokens that are run: the answer's last one predicts nothing that is asked for."""
        return self.before + self.traced + self.answer - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What times are computed with: its bytes, and what is reached a second, not promised: operations in half
    precision, bytes read, and operations in float64 on the processor beside it, where edits are solved.
    """

    memory: int
    half: float
    bandwidth: float
    processor_double: float


TOWER = 303_000_000 + 21_000_000
"""CLIP ViT-L/14 at 336 pixels, and LLaVA-1.5's projector, about."""

LLAVA_7B = Shape(
    name="LLaVA-1.5-7B", width=4096, inner=11008, layers=32, heads=32, kv_heads=32, vocabulary=32064,
    image_tokens=576, tower_parameters=TOWER,
)  # fmt: skip
LLAVA_13B = Shape(
    name="LLaVA-1.5-13B", width=5120, inner=13824, layers=40, heads=40, kv_heads=40, vocabulary=32064,
    image_tokens=576, tower_parameters=TOWER,
)  # fmt: skip
LLAMA_70B = Shape(
    name="Llama-2-70B", width=8192, inner=28672, layers=80, heads=64, kv_heads=8, vocabulary=32000
)  # fmt: skip
SHAPES = (LLAVA_7B, LLAVA_13B, LLAMA_70B)

ASSUMED = Device(memory=80 * 10**9, half=400 * TERA, bandwidth=2.5 * TERA, processor_double=0.5 * TERA)
"""Not measured: 40 % of the operations and 75 % of the bandwidth that an H100 SXM promises, and 16 good cores."""

BYTES = {"bfloat16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of a parameter of a layer's products: nf4 has a float32 for every 64."""

COMPONENTS, TRACE_ROWS = 3, 256
"""What a trace restores, and the rows of its batch: TraceSettings' defaults."""

STEPS, CONTEXTS, PRESERVED = 150, 12, 6
"""Of a value's descent: ValueSettings' most steps and most contexts, and prompts that are preserved."""

REFERENCES = 1000

_USABLE, BATCH = 0.9, 8 * GIB
"""The share of a device's memory that is given out, and what of it is kept for the running batch."""


def asked_of(shape: Shape) -> Question:
    """The question of the tables: 24 tokens before the constraint, beside the image's, and 20 from there on."""
    return Question(before=shape.image_tokens + 24, traced=20, answer=4)


def weight_bytes(shape: Shape, precision: str) -> float:
    """Of all weights; what is no layer's product stays in half precision."""
    return shape.linear_parameters * BYTES[precision] + 2 * shape.other_parameters


def kv_bytes(shape: Shape, width: int = 2) -> int:
    """Keys and values of one token."""
    return 2 * shape.layers * shape.width * shape.kv_heads // shape.heads * width


def layer_operations(shape: Shape, tokens: int, seen: int) -> int:
    """One layer on `tokens` that each attend to `seen`: 2·p·n + 4·d·n·T."""
    return 2 * shape.layer_parameters * tokens + 4 * shape.width * tokens * seen


def head_operations(shape: Shape, positions: int) -> int:
    """Logits at so many positions: 2·d·V·n."""
    return 2 * shape.width * shape.vocabulary * positions


def pass_operations(shape: Shape, tokens: int) -> int:
    """A whole row with the logits of its last token; a tower's products take its parameters once a token, too."""
    tower = 2 * shape.tower_parameters * (shape.image_tokens + 1)
    return shape.layers * layer_operations(shape, tokens, tokens) + head_operations(shape, 1) + tower


def trace_operations(shape: Shape, question: Question, components: int = COMPONENTS) -> int:
    """A causal trace with a window of 1.

    The clean and the corrupted row, each read again from its last layer; then, for each token t of the traced, one run
    for each component and layer ℓ over the n = T − t tokens from there and the L − ℓ layers from there:
    Σ_t c·(L(L+1)/2)·(2·p·n + 4·d·n·T) + c·L·(2·d·V·answer).
    """
    length, layers = question.length, shape.layers
    read = layer_operations(shape, length - question.before, length) + head_operations(shape, question.answer)
    whole = 2 * (pass_operations(shape, length) + read)
    climbed = sum(layer_operations(shape, length - question.before - t, length) for t in range(question.traced))
    runs = question.traced * components * layers
    return whole + components * layers * (layers + 1) // 2 * climbed + runs * head_operations(shape, question.answer)


def plain_trace_operations(shape: Shape, question: Question, components: int = COMPONENTS) -> int:
    """Three full rows for every site, as the reference implementation runs them."""
    return 3 * question.traced * components * shape.layers * pass_operations(shape, question.length)


def step_operations(shape: Shape, question: Question, layer: int) -> int:
    """A step of a value's descent, of one row: forward above the edited layer, and backward without weights.

    Over the n tokens from the constraint's last one on. Keys and values before them take no gradient; their own do.
    """
    n, above = question.length - question.before - question.constraint + 1, shape.layers - layer - 1
    forward, backward = (layer_operations(shape, n, seen) for seen in (question.length, question.length + n))
    return above * (forward + backward) + 2 * head_operations(shape, question.answer)


def values_operations(shape: Shape, question: Question, layer: int, rows: int, steps: int = STEPS) -> int:
    """A request's value: its rows once as a whole, and `steps` of its descent."""
    return rows * (pass_operations(shape, question.length) + steps * step_operations(shape, question, layer))


def statistics_operations(shape: Shape, tokens: int, length: int, layers: int = 1) -> int:
    """C₀ over so many tokens of rows of this length: the passes, and kkᵀ of every token: 2·m² each."""
    return tokens // length * pass_operations(shape, length) + 2 * layers * tokens * shape.inner**2


def statistics_bytes(shape: Shape) -> int:
    """C₀ of a layer in float64, m × m."""
    return 8 * shape.inner**2


def solve_operations(shape: Shape, keys: int) -> float:
    """C₀'s factor and C₀⁻¹K: m³/3 + 2·m²·n, in float64. What follows is of n keys, and small."""
    return shape.inner**3 / 3 + 2 * shape.inner**2 * keys


def trace_bytes(shape: Shape, question: Question, rows: int = TRACE_ROWS) -> float:
    """A trace beside the weights: two recordings, and of the batch the largest state of a layer or the head.

    The states are the MLP's inner ones, three times, and the attention's scores, in half and in float32; the head's
    are logits and their logarithms in float32.
    """
    length, suffix = question.length, question.length - question.before
    recorded = 2 * length * kv_bytes(shape) + 2 * 2 * shape.layers * (1 + COMPONENTS) * suffix * shape.width
    stream = 2 * 2 * rows * suffix * shape.width
    inner = 3 * 2 * rows * suffix * shape.inner
    scores = (2 + 4 + 2) * rows * shape.heads * suffix * length
    logits = 2 * 4 * rows * question.answer * shape.vocabulary
    return recorded + stream + max(inner, scores, logits)


def adapter_bytes(shape: Shape, rank: int, layers: int) -> int:
    """A version's factors in float32: r·(m + d) a layer."""
    return 4 * rank * (shape.inner + shape.width) * layers


def decode_seconds(shape: Shape, precision: str, device: Device) -> float:
    """A token of a small batch: the layers' and the head's weights are read once."""
    read = shape.linear_parameters * BYTES[precision] + 2 * shape.width * shape.vocabulary
    return read / device.bandwidth


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def weights_table(device: Device = ASSUMED) -> str:
    def fits(size: float) -> str:
        return f"{size / GIB:.1f}" + ("" if size < _USABLE * device.memory else ", too large")

    rows = [
        [
            s.name,
            f"{(s.linear_parameters + s.other_parameters) / 1e9:.2f} G",
            *(fits(weight_bytes(s, p)) for p in BYTES),
        ]
        for s in SHAPES
    ]
    return table(["model", "parameters", *(f"{p}, GiB" for p in BYTES)], rows)


def memory_table() -> str:
    rows = []
    for s in SHAPES:
        q = asked_of(s)
        rows.append(
            [
                s.name,
                f"{q.length}",
                f"{kv_bytes(s) / 1024:.0f} KiB",
                f"{q.length * kv_bytes(s) / 2**20:.0f} MiB",
                f"{trace_bytes(s, q) / GIB:.1f} GiB",
                f"{statistics_bytes(s) / GIB:.2f} GiB",
                f"{(CONTEXTS + PRESERVED) * q.length * kv_bytes(s) / GIB:.1f} GiB",
            ]
        )
    head = ["model", "tokens of a row", "keys and values of a token", "of a row", f"a trace of {TRACE_ROWS} rows",
            "C₀ of a layer, float64", f"of the {CONTEXTS + PRESERVED} rows of a value, at most"]  # fmt: skip
    return table(head, rows)


def trace_table(device: Device = ASSUMED) -> str:
    rows = []
    for s in SHAPES:
        q = asked_of(s)
        ours, plain = trace_operations(s, q), plain_trace_operations(s, q)
        rows.append(
            [
                s.name,
                f"{q.traced * COMPONENTS * s.layers:,}",
                f"{pass_operations(s, q.length) / TERA:.1f}",
                f"{ours / TERA:,.0f}",
                f"{ours / device.half:.1f} s",
                f"{plain / TERA:,.0f}",
                f"{plain / ours:.0f}×",
            ]
        )
    head = ["model", "sites", "one row, TFLOP", "trace, TFLOP", "time", "three rows a site, TFLOP", "ratio"]
    return table(head, rows)


def edit_table(device: Device = ASSUMED) -> str:
    rows = []
    for s, layer in zip(SHAPES, (3, 3, 10), strict=True):
        q, n = asked_of(s), CONTEXTS + PRESERVED
        values = values_operations(s, q, layer, n)
        gathered = statistics_operations(s, REFERENCES * q.length, q.length)
        rows.append(
            [
                s.name,
                f"{layer}",
                f"{n * step_operations(s, q, layer) / TERA:.1f}",
                f"{values / TERA:,.0f}",
                f"{values / device.half:.1f} s",
                f"{gathered / device.half:.0f} s",
                f"{solve_operations(s, 1) / TERA:.2f}",
                f"{solve_operations(s, 1) / device.processor_double:.2f} s",
            ]
        )
    head = ["model", "layer", "a step, TFLOP", f"{STEPS} steps, TFLOP", "time",
            f"C₀ of {REFERENCES:,} references", "solve, TFLOP in float64", "time"]  # fmt: skip
    return table(head, rows)


def versions_table(device: Device = ASSUMED) -> str:
    rows = []
    for s, precision in ((LLAVA_7B, "bfloat16"), (LLAVA_7B, "nf4"), (LLAVA_13B, "bfloat16"), (LLAMA_70B, "nf4")):
        free = _USABLE * device.memory - weight_bytes(s, precision) - BATCH
        for rank, layers in ((1, 1), (64, 1), (64, 3)):
            size = adapter_bytes(s, rank, layers)
            token = f"{1000 * decode_seconds(s, precision, device):.0f} ms"
            held = f"{int(free // size):,}"
            rows.append([s.name, precision, f"{rank}", f"{layers}", f"{size / 2**20:.2f} MiB", held, token])
    head = ["model", "base in", "rank", "layers", "one version", "versions on one device", "a token, from the weights"]
    return table(head, rows)


def main() -> None:
    for title, made in (
        ("Weights", weights_table()),
        ("Memory", memory_table()),
        ("A trace", trace_table()),
        ("An edit", edit_table()),
        ("Versions", versions_table()),
    ):
        print(f"## {title}\n\n{made}\n")


if __name__ == "__main__":
    main()
