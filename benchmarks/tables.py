"""The page docs/benchmarks.md."""

from .pages import Section, both, by_shape, group, measured_implementations, number, shape_of, table, tokens
from .report import OURS, Record

PORTABLE = "its portable kernels"
COLUMNS = {
    PORTABLE: "portable kernels",
    "our decoding state": "decoding state",
    "fla chunk_simple_gla": "fla chunk",
    "fla fused_chunk_simple_gla": "fla fused",
    "fla fused_recurrent_simple_gla": "fla recurrent",
    "OpenNLPLab lightning_attn": "OpenNLPLab",
    "lightning-1": "Lightning-1",
}
HEADER = """\
# Benchmarks

<!-- Written by python -m benchmarks tables from benchmarks/results. Edit benchmarks/tables.py, not this page. -->

Each table names the GPU, the date, the commit and the file that it comes from.
Implementations of the operator and of a step take turns within one run, and each is checked against float64 before it
is timed; times are medians. Models run one after another, and times are means of their steps.
**× floor** divides a time by that of reading the inputs and writing the results once, at the speed of a copy.
**Workspace** is memory beyond inputs and results.
Columns named after another implementation say how many times slower it is than ours in the same run.
A cell with two numbers is forward / backward.

```console
$ python -m benchmarks op       # the operator, forward and backward
$ python -m benchmarks decode   # decoding: the operator, a model, the engine
$ python -m benchmarks speed    # training steps of whole sequences
$ python -m benchmarks mixers   # every attention in the same model
$ python -m benchmarks parallel # training steps of several processes
$ python -m benchmarks train    # a training step on one long sequence
$ python -m benchmarks heads    # many heads: more than the GPU runs at once
$ python -m benchmarks segments # few heads, cut into segments
$ python -m benchmarks step     # forward and backward of a model, by kernels
$ python -m benchmarks counters # counters of Nsight Compute
$ python -m benchmarks host     # time of the host for a call
$ python -m benchmarks scaling  # predictions for many GPUs
$ python -m benchmarks paper    # the tables and figures of the papers
$ python -m benchmarks tables   # writes this page
```

Sizes of models are names. 385M has 385M parameters with a vocabulary of 50,272 and 399M with the 64,000 used here.
"""


def operator(results: list[Record]) -> str:
    """Times of forward and backward, per shape and implementation."""
    shapes = by_shape(results)
    others = measured_implementations(results)
    header = ["B, T, H, D", "ms", "× floor", "workspace, MiB", *(COLUMNS.get(name, name) for name in others)]
    rows = []
    for shape, found in shapes.items():
        ours = found[OURS]
        row = [shape, both(ours, "milliseconds"), both(ours, "times_floor"), both(ours, "workspace_bytes", 2**-20)]
        rows.append(row + [both(found.get(name, {}), "times_ours") for name in others])
    return table(header, rows)


def decoding_operator(results: list[Record]) -> str:
    """Times of one token of B sequences, from a plain state; of others relative to it."""
    others = measured_implementations(results)
    header = ["B, H, D", "µs in a CUDA graph", "× floor", *(COLUMNS.get(name, name) for name in others)]
    rows = []
    for shape, found in by_shape(results).items():
        ours = found[OURS]["graph"]
        row = [shape, number(ours["microseconds"]), number(ours["times_floor"])]
        rows.append(row + [number(found[name]["graph"]["times_ours"]) for name in others])
    return table(header, rows)


def decoding_model(results: list[Record]) -> str:
    """Time of a token and size of the cache against the context length."""
    others = measured_implementations(results)
    header = ["context length", "ms", "state, MiB", *(f"{name}, ms" for name in others), "KV cache, MiB"]
    rows = []
    for length, found in sorted(group(results, lambda x: x["length"]).items()):
        caches = [found[name]["state_bytes"] / 2**20 for name in others if "state_bytes" in found.get(name, {})]
        row = [tokens(length), number(found[OURS]["milliseconds"]), number(found[OURS]["state_bytes"] / 2**20)]
        row += [number(found.get(name, {}).get("milliseconds")) for name in others]
        rows.append([*row, number(max(caches)) if caches else ""])
    note = "Time from a token to its logits, in a CUDA graph. The softmax model has the same layers with a KV cache.\n"
    return note + note_of_model(results) + table(header, rows)


def engine(results: list[Record]) -> str:
    """Answers of the engine, and of `generate()` for some of the requests."""
    header = ["", "requests", "at a time", "seconds", "tokens/s"]
    rows = []
    for x in results:
        is_engine = x["implementation"] == OURS
        name = "engine, CUDA graph" if is_engine else x["implementation"] + ", eager"
        at_a_time = x["max_requests"] if is_engine else 1
        rows.append([name, *map(number, (x["requests"], at_a_time, x["seconds"], x["tokens_per_second"]))])
    return note_of_model(results) + table(header, rows)


def training(results: list[Record]) -> str:
    """Speed and memory of a step against the sequence length."""
    header = ["sequence length", "step, s", "tokens/s", "memory, GiB", "not segmented, tokens/s", "memory, GiB"]
    rows = []
    for length, found in sorted(group(results, lambda x: x["length"]).items()):
        row = [tokens(length), number(found[OURS]["seconds"])]
        for name in (OURS, "as a whole"):
            x = found.get(name, {})
            memory = number(x["peak_bytes"] / 2**30) if "peak_bytes" in x else out_of_memory(x)
            row += [number(x.get("tokens_per_second")), memory]
        rows.append(row)
    segment = results[0]["segment_length"]
    note = f"Forward, backward and AdamW in training segments of {segment:,} tokens.\n"
    note += "Memory is beyond parameters, gradients and optimizer state.\n"
    return note + note_of_model(results) + table(header, rows)


def few_heads(results: list[Record]) -> str:
    """Times of the Hopper and the portable kernels where heads are few."""
    header = ["B, T, H, D", "Hopper kernels, ms", "portable kernels, ms", "segments at that commit"]
    rows = []
    for x in results:
        cells = [
            " / ".join(number(x[f"{direction}_milliseconds"][name]) for direction in ("forward", "backward"))
            for name in ("chosen", "portable")
        ]
        rows.append([shape_of(x), *cells, " / ".join(map(str, x["chosen"]))])
    return table(header, rows)


def many_heads(results: list[Record]) -> str:
    """Times of a head over those where heads fill the GPU once."""
    note = "Time of a token and head over that of the first number of heads at this length, with one segment.\n\n"
    passes = [f"{direction}_milliseconds" for direction in ("forward", "backward")]
    first: dict[tuple[int, int], Record] = {}
    rows = []
    for x in results:
        alone = first.setdefault((x["length"], x["head_dim"]), x)
        share = alone["num_heads"] / x["num_heads"]
        cells = [
            " / ".join(number(share * x[key][name] / alone[key]["1"]) for key in passes)
            for name in ("chosen", "1", "portable")
        ]
        rows.append([shape_of(x), *cells])
    return note + table(["B, T, H, D", "as chosen", "one segment", "portable kernels"], rows)


def steps(results: list[Record]) -> str:
    """Speed and memory of training steps of whole sequences."""
    others = measured_implementations(results)
    rows = []
    for found in group(results, lambda x: (x["size"], x["length"])).values():
        ours = found[OURS]
        row = [ours["size"], tokens(ours["length"]), f"{ours['batch_size'] * ours['length']:,}"]
        row += [number(ours["tokens_per_second"]), number(100 * ours["peak_share"]) if ours["peak_share"] else ""]
        row += [number(ours["peak_bytes"] / 2**30) if ours["peak_bytes"] else ""]
        rows.append([*row, *(number(found[name].get("times_ours")) if name in found else "" for name in others)])
    columns = ["size", "sequence length", "tokens of a step", "tokens/s", "of the peak, %", "memory, GiB", *others]
    compiled = "compiled" if results[0]["compiled"] else "eager"
    note = f"Forward, backward and AdamW in {results[0].get('dtype', 'bfloat16')}, layers {compiled}.\n"
    if results[0]["peak_bytes"]:
        note += "Memory has weights, gradients and moments. The peak counts 6 operations a parameter and token.\n"
    note += "The LLaMA has the same width, depth and vocabulary, and transformers' own loss of all logits.\n\n"
    return note + table(columns, rows)


def mixers_by_length(results: list[Record], note: str, *columns: tuple[str, str, float]) -> str:
    """A row per attention, and of every column, a name, a key and a factor, a cell per length."""
    lengths = sorted({x["length"] for x in results})
    names = list(dict.fromkeys(x["implementation"] for x in results))
    found = group(results, lambda x: x["length"])
    header = ["attention", *(f"{tokens(n)}, {name}" for name, _, _ in columns for n in lengths)]
    rows = []
    for name in names:
        cells = []
        for _, key, factor in columns:
            values = [found[n].get(name, {}).get(key) for n in lengths]
            cells += [number(None if value is None else value * factor) for value in values]
        rows.append([name, *cells])
    return note.format(size=results[0]["size"]) + "\n\n" + table(header, rows)


def mixers_training(results: list[Record]) -> str:
    """Training steps of every attention in the same model."""
    compiled = "compiled" if results[0]["compiled"] else "eager"
    note = f"Forward, backward and AdamW of size {{size}}, layers {compiled}."
    columns = [("tokens/s", "tokens_per_second", 1.0)]
    if any(x.get("peak_bytes") for x in results):
        columns.append(("GiB", "peak_bytes", 2**-30))
    return mixers_by_length(results, note, *columns)


def mixers_decoding(results: list[Record]) -> str:
    """A token of every attention after contexts of these lengths."""
    note = "One sequence of size {size}: a token after a context, on a GPU in a CUDA graph, and the size of its cache."
    return mixers_by_length(results, note, ("ms", "milliseconds", 1), ("MiB", "state_bytes", 2**-20))


def mixers_loss(results: list[Record]) -> str:
    """Loss of every attention after the same text."""
    measured = [x for x in results if "held_out_loss" in x]
    note = f"Held-out text of Python's standard library, size {measured[0]['size']} trained on "
    note += f"{measured[0]['trained_tokens']:,} bytes of it.\n\n"
    rows = [[x["implementation"], number(x["held_out_loss"])] for x in measured]
    return note + table(["attention", "loss, nats a byte"], rows)


def parallel_steps(results: list[Record]) -> str:
    """Speed of a process beside that of one process alone."""
    header = ["", "size", "processes", "tokens of a process", "sequence length", "tokens/s of a process", "of one, %"]
    rows = []
    for x in results:
        sizes = x["kind"], x["size"], str(x["processes"]), f"{x['tokens_of_a_process']:,}", tokens(x["length"])
        rows.append([*sizes, number(x["tokens_per_second"]), number(100 * x["of_one_process"])])
    return table(header, rows)


def model_step(results: Record) -> str:
    """Speed of forward and backward of a model, by attention kernels."""
    header = ["attention kernels", "tokens/s", "attention, % of the time of all kernels"]
    rows = [
        [name, *map(number, (x["graph_tokens_per_second"], 100 * x["attention_share"]))] for name, x in results.items()
    ]
    return "Size 385M, one sequence of 8192 tokens, bf16 autocast, in a CUDA graph.\n\n" + table(header, rows)


def counters(results: list[Record]) -> str:
    """Shares of the GPU that each kernel keeps busy when it runs alone."""
    header = ["B, T, H, D", "kernel", "ms", "memory, %", "L2, %", "compute, %", "issue slots, %"]
    names = ("milliseconds", "memory_percent", "l2_percent", "compute_percent", "issue_percent")
    rows = [
        [shape_of(x) if i == 0 else "", f"`{launch['kernel']}`", *(number(launch[name]) for name in names)]
        for x in results
        for i, launch in enumerate(x["launches"])
    ]
    return table(header, rows)


def note_of_model(results: list[Record]) -> str:
    return f"Size {results[0]['size']}, one GPU, bf16, random weights.\n\n"


def out_of_memory(x: Record) -> str:
    return "out of memory" if "OutOfMemoryError" in x.get("not_measured", "") else ""


def invariant(results: list[Record]) -> str:
    """Times of the free choice, and of invariant results over them."""
    header = ["B, T, H, D", "forward / backward, ms", "invariant, × as long"]
    rows = []
    for shape, found in by_shape(results).items():
        rows.append([shape, both(found[OURS], "milliseconds"), both(found["invariant"], "times_ours")])
    note = "`invariant=True` cuts no sequence for several programs, so few heads leave a GPU idle.\n\n"
    return note + table(header, rows)


SECTIONS = [
    Section("The operator", "table", "scan", operator),
    Section("The operator against the sequence length", "sweep", "scan", operator),
    Section("Few heads", "segments", "scan", few_heads),
    Section("Many heads", "heads", "scan", many_heads),
    Section("The cost of equal bits", "invariant", "scan", invariant),
    Section("Decoding: the operator", "kernel", "step", decoding_operator),
    Section("Decoding: a model", "model", "step", decoding_model),
    Section("Decoding: the engine", "engine", "scan", engine),
    Section("Training on one long sequence", "train", "scan", training),
    Section("Training steps", "speed", "scan", steps),
    Section("Attentions in the same model: training", "mixers-training", "scan", mixers_training),
    Section("Attentions in the same model: decoding", "mixers-decoding", "scan", mixers_decoding),
    Section("Attentions in the same model: loss", "mixers-loss", "scan", mixers_loss),
    Section("Training steps of several processes", "parallel", "scan", parallel_steps),
    Section("Forward and backward of a model", "step", "scan", model_step),
    Section("Nsight Compute", "counters", "scan", counters),
]
