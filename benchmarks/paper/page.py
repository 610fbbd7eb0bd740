"""The page docs/paper.md."""

import json
from collections.abc import Callable

from ..pages import RESULTS, Section, both, group, number, table, tokens
from ..report import OURS, Record
from .generation import KIND as GENERATION
from .length import KIND as LENGTH
from .operator import KIND as OPERATOR
from .recall import KIND as RECALL
from .training import KIND as TRAINING
from .training import OURS as LIGHTNING2
from .training import SYSTEMS

TRAINED = 1024  # tokens of a sequence in the table of quality
_MANIFEST = json.loads((RESULTS / "corpus.json").read_text(encoding="utf-8"))
_MEGABYTES, _MILLION_WORDS = (
    sum(split[name] for split in _MANIFEST["splits"].values()) / 1e6 for name in ("bytes", "words")
)
HEADER = f"""\
# The papers, redone

<!-- Written by python -m benchmarks tables from benchmarks/results. Edit benchmarks/paper/page.py, not this page. -->

The experiments of Lightning Attention-2 ([2401.04658](https://arxiv.org/abs/2401.04658)) and of TransNormerLLM
([2405.17381](https://arxiv.org/abs/2405.17381)), each as a command for one GPU. A table stands here
once its results are in the repository, with the paper's figures beside ours.

| paper | command | measures |
|---|---|---|
| LA-2, Table 1 and Figure 1 | `paper training` | tokens/s of training: Lightning-2, Lightning-1 and a LLaMA |
| LA-2, Figure 3; TNL, Figure 4 | `paper operator` | time and memory, with FlashAttention-2 and plain PyTorch |
| LA-2, Table 2 | `paper learn --table exactness` | loss with Lightning-1 and Lightning-2, same seed |
| TNL, Table 1 | `paper learn --table quality` | perplexity of a word and bits a byte of every attention |
| TNL, Tables 4 to 9 | `paper learn --table ablations` | loss with another position, decay, gate, norm, activation |
| TNL, Figure 5 | `paper generation` | new tokens/s in the largest batch, ours and a LLaMA |
| PI, StreamingLLM | `paper length` | loss by position in documents longer than those of training |
| MiniMax-01 | `paper recall` | needles that are found in longer haystacks than those of training |

```console
$ python -m benchmarks paper corpus                                    # text, on Debian 12
$ python -m benchmarks paper learn --table quality --keep runs
$ python -m benchmarks paper length --runs runs
```

**What differs.** The papers trained models of up to 15B parameters on up to 100 billion tokens; these are smaller and
see less text, so differences between models count, not their losses. WikiText-103 is replaced by documentation that
Debian distributes: {_MEGABYTES:.0f} MB of English text, {_MILLION_WORDS:.0f} million words, from
{len(_MANIFEST["packages"])} packages ([versions and sizes](../benchmarks/results/corpus.json)): manuals, dictionaries,
a book on Debian, a FAQ on anarchism. Its licences are free ones and differ by package; `paper corpus` keeps their
copyright files beside the text. Blocks of text that come again are left out, also between documents, and a document is
in the test text by the hash of its text. The vocabulary is a BPE of bytes, trained on the same text. A word is what
white space separates; its perplexity is `exp(nats of the test text / words of the test text)`, which does not depend on
the vocabulary. Test documents are read in sequences of the length of training, so a token at the start of a sequence is
predicted from little.
"""


def learned(results: list[Record]) -> str:
    """What models have learned from the same text."""
    first = results[0]
    note = f"{first['trained_tokens']:,} tokens in sequences of {first['length']}, {first['dtype']}, seed "
    note += f"{first['seed']}. Loss in nats a token of the test text. The paper's figure is of its own setting.\n"
    note += _commits(results, lambda x: x["implementation"]) + "\n"
    header = ["model", "parameters, M", "word perplexity", "bits a byte", "loss", "tokens/s", "GiB", "paper"]
    rows = []
    for x in results:
        if "not_measured" in x:
            rows.append([x["implementation"], x["not_measured"], *[""] * (len(header) - 2)])
            continue
        row = [x["implementation"], number(x["parameters"] / 1e6), number(x["word_perplexity"])]
        row += [number(x["bits_per_byte"]), f"{x['loss']:.4f}", number(x["tokens_per_second"])]
        row += [number(x["peak_bytes"] / 2**30) if x["peak_bytes"] else ""]
        rows.append([*row, str(x["published"]) if x["published"] else ""])
    return note + table(header, rows)


def quality(results: list[Record]) -> str:
    """What the models of Table 1 have learned, and where that is not as in the paper."""
    note = "The paper has TNL ahead of the Transformer. Here softmax attention, in all layers or in one of eight, is\n"
    note += "far ahead of TNL alone, which is far ahead of the linear attentions without decay. Among these the paper\n"
    note += "has cosFormer first and Performer last by far; here Performer is first. A second run of the LLaMA, same\n"
    note += "seed, came to 325.6: smaller differences than that mean nothing.\n\n"
    return note + learned(results)


def ablations(results: list[Record]) -> str:
    """How the loss differs where one thing of TNL is another, here and in the paper."""
    first = results[0]
    note = f"{first['trained_tokens']:,} tokens in sequences of {first['length']}, {first['dtype']}; "
    note += "nats a token of the test text.\n"
    note += "The paper's losses are of 385M parameters after 100,000 updates. One seed shows differences of 0.05 and\n"
    note += (
        "more. Learned positions, LRPE alone, no gate and no activation of queries and keys are worse than TNL, as\n"
    )
    note += "in the paper. Norms with weights are better than SRMSNorm at this size and budget, which the paper does\n"
    note += "not find. The other differences are too small to tell; all but that of the decay have its sign.\n\n"
    seeds = group(results, lambda x: x["seed"])
    header = ["model"]
    for seed in seeds:
        header += [f"loss, seed {seed}", "minus TNL's"]
    rows = []
    for x in results:
        if x["seed"] != first["seed"]:
            continue
        row = [x["implementation"]]
        for found in seeds.values():
            row += _differences(found, x["implementation"], "loss", 4)
        paper = {"TNL": first, x["implementation"]: x}
        rows.append(row + _differences(paper, x["implementation"], "published", 3))
    return note + table([*header, "loss, paper", "minus TNL's"], rows)


def _differences(found: dict[str, Record], name: str, key: str, digits: int) -> list[str]:
    """A loss, and its difference from TNL's."""
    if key not in found.get(name, {}):
        return ["", ""]
    loss = found[name][key]
    return [f"{loss:.{digits}f}", "" if name == "TNL" else f"{loss - found['TNL'][key]:+.3f}"]


def training(results: list[Record]) -> str:
    """Tokens a second of training steps, beside those of the paper."""
    note = "Tokens/s of forward, backward and AdamW on a GPU; in brackets the paper's, of each of two A100s of 80 GB.\n"
    note += "Longer sequences, in training segments: [benchmarks](benchmarks.md#training-on-one-long-sequence).\n"
    note += _times_published(results)
    note += _commits(results, lambda x: f"{x['size']} at {tokens(x['length'])}") + "\n"
    rows = []
    for (size, length), found in group(results, lambda x: (x["size"], x["length"])).items():
        rows.append([size, tokens(length), *(_beside(found.get(name, {}), "tokens_per_second") for name in SYSTEMS)])
    return note + table(["size", "sequence length", *SYSTEMS], rows)


def _times_published(results: list[Record]) -> str:
    """Least and most speed of Lightning-2 over the paper's, by size."""
    ratios: dict[str, list[float]] = {}
    for x in results:
        if x["implementation"] == LIGHTNING2 and x.get("published") and "tokens_per_second" in x:
            ratios.setdefault(x["size"], []).append(x["tokens_per_second"] / x["published"])
    sizes = ", ".join(f"{min(found):.1f} to {max(found):.1f} ({size})" for size, found in ratios.items())
    return f"Lightning-2 has {sizes} times the paper's tokens/s.\n" if sizes else ""


# The names of implementations in the papers' figures.
FIGURE = {OURS: "Lightning-2", "lightning-1": "Lightning-1", "SDPA flash": "FlashAttention-2"}


def operator(results: list[Record]) -> str:
    """Time and memory of forward and backward against the length."""
    first = results[0]
    sizes = f"{first['batch_size']} sequences, {first['num_heads']} heads of {first['head_dim']}, {first['dtype']}"
    note = f"Milliseconds of forward / backward, and GiB of both beyond the inputs; {sizes}.\n\n"
    names = list(dict.fromkeys(x["implementation"] for x in results))
    titles = [FIGURE.get(name, name) for name in names]
    rows = []
    for length, found in sorted(group(results, lambda x: x["length"]).items()):
        memory = [found[name].get("peak_bytes") for name in names]
        row = [tokens(length), *(both(found[name], "milliseconds") or _missing(found[name]) for name in names)]
        rows.append(row + [number(None if size is None else size / 2**30) for size in memory])
    header = ["sequence length", *(f"{title}, ms" for title in titles), *(f"{title}, GiB" for title in titles)]
    return note + table(header, rows)


def generation(results: list[Record]) -> str:
    """New tokens a second in the best batch."""
    first = results[0]
    note = f"Prompts of {first['prompt']} tokens, {first['new']} new ones, by generate(); the paper's on an A100 in "
    note += "brackets.\nThe best of the batch sizes that were tried and fit. "
    note += "The LLaMA is this library's, with its cache of keys and values.\n"
    note += _commits(results, lambda x: x["size"]) + "\n"
    rows = [
        [x["implementation"], x["size"], _beside(x, "tokens_per_second"), number(x.get("batch_size"))] for x in results
    ]
    return note + table(["model", "size", "new tokens/s", "sequences"], rows)


def by_length(results: list[Record]) -> str:
    """Loss of tokens by their position."""
    note = f"Mean loss in nats a token of {results[0]['documents']} documents, by position; the models are those of\n"
    note += f"[the table above](#attentions-learn-from-the-same-text), trained on {TRAINED} tokens a sequence.\n"
    note += "Position Interpolation is trained on for 200 steps of the longer documents. TNL goes on as it is, at a\n"
    note += "higher loss than softmax attention with a remedy; softmax attention without one fails.\n\n"
    return note + _spread(results, "loss", "positions")


def recall(results: list[Record]) -> str:
    """Share of needles found by length."""
    first = results[0]
    note = (
        f"Share of {first['needles']} needles found, by length; models of 8 layers and a width of 256, from scratch\n"
    )
    note += (
        f"on this task alone: {first['steps']} steps of {first['batch_size']} sequences of {first['length']} tokens.\n"
    )
    note += f"A model that only guesses among the values in the sequence finds {1 / first['needles']:.3f}.\n"
    note += "MiniMax-01 reports that language models of linear attention alone retrieve poorly, and hybrids well. On\n"
    note += "this task, with few needles, TNL finds all, and goes on furthest beyond the trained length; the rotary\n"
    note += (
        "positions of softmax attention do not. Softmax attention alone has not left the guess within these steps.\n\n"
    )
    return note + _spread(results, "found", "tokens")


def _spread(results: list[Record], key: str, name: str) -> str:
    """A row per model, and a column per entry at `key`."""
    measured = [x for x in results if key in x]
    columns = list(measured[0][key])
    rows = [[x["implementation"], *(number(x[key][column]) for column in columns)] for x in measured]
    return table([f"model, {name}", *columns], rows)


def _commits(results: list[Record], label: Callable[[Record], str]) -> str:
    """The results that are of other commits than their run."""
    labels: dict[str, list[str]] = {}
    for x in results:
        if "commit" in x and label(x) not in labels.setdefault(x["commit"], []):
            labels[x["commit"]].append(label(x))
    return "".join(f"{', '.join(found)}: commit `{commit[:8]}`.\n" for commit, found in labels.items())


def _beside(x: Record, key: str) -> str:
    published = f" ({x['published']:,})" if x.get("published") else ""
    return (number(x[key]) if key in x else _missing(x)) + published


def _missing(x: Record) -> str:
    return "out of memory" if "OutOfMemoryError" in x.get("not_measured", "") else "not measured"


SECTIONS = [
    Section("Speed of training", TRAINING, "scan", training),
    Section("The operator", OPERATOR, "scan", operator),
    Section("Lightning-1 and Lightning-2 learn the same", "paper-exactness", "scan", learned),
    Section("Attentions learn from the same text", "paper-quality", "scan", quality),
    Section("Ablations", "paper-ablations", "scan", ablations),
    Section("Generation", GENERATION, "scan", generation),
    Section("Beyond the trained length", LENGTH, "scan", by_length),
    Section("Needles in a haystack", RECALL, "scan", recall),
]
